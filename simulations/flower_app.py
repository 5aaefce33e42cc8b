"""Where Flower's tools look for the two apps (pyproject.toml, [tool.flwr.app.components]).

Flower copies this file out of the repository and imports it as `simulations.flower_app`; all that
it runs is the medfl that is installed. The two names must be assigned here: Flower reads, not runs.
"""

from medfl.simulations import flower

client_app = flower.client_app
server_app = flower.server_app
