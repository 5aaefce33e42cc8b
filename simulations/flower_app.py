"""Where Flower's tools look for the two apps (pyproject.toml, [tool.flwr.app.components]).

Flower copies this file out of the repository and imports it as `simulations.flower_app`; all that
it runs is the medfl that is installed. The two names must be assigned here: Flower reads, not runs.
"""

import os

from medfl.simulations import flower

# Flower imports this before it starts Ray, which tells an outside host who uses it unless told not.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

client_app = flower.client_app
server_app = flower.server_app
