"""A study's network, built once before anybody signs: what would end every run at its start.

The same rules hold at the start of a run (`refuse_misfit`): what is foreseen is what is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medfl.common.errors import ConfigError, MedflError
from medfl.common.models import build_model
from medfl.common.models.norms import has_batch_norm
from medfl.common.records import columns
from medfl.common.statistics import Shared
from medfl.common.study import Study
from medfl.strategies.buffers import buffer_names, refuse_unbounded
from medfl.strategies.catalogue import strategy_for
from medfl.strategies.home import home_names
from medfl.strategies.strategy import Local

if TYPE_CHECKING:
    from torch import nn

# Of a category whose levels only the hospitals know; how many there are changes no rule.
_SOME_LEVELS = ("a", "b")


def refuse_misfit(study: Study, module: nn.Module, local: Local) -> None:
    """Raises ConfigError where the network cannot be trained as the study combines it."""
    if study.federation.keep == "average" and has_batch_norm(module):
        raise ConfigError(
            "federation.keep: the model has batch norm, whose statistics a mean of models does not "
            'have; set model.options.norm to "group", or keep to "last"'
        )
    refuse_unbounded(study, buffer_names(module) - home_names(module, local))


def misfits(study: Study) -> list[str]:
    """One line each; for a study whose names are all in the catalogues (`study_faults`).

    It takes seconds where MONAI is to be imported. Start weights are looked at where their file is.
    """
    # With [privacy] everybody gets the network without batch norm.
    shared = Shared(
        levels={f.name: _SOME_LEVELS for f in (study.record.features if study.record else ())},
        private=study.privacy is not None,
    )
    n_features = len(columns(study.record, shared)) if study.record is not None else None
    try:
        module = build_model(study, shared, n_features=n_features, seed=0)
        refuse_misfit(study, module, strategy_for(study).local)
    except ConfigError as error:
        return error.faults
    except MedflError as error:
        return [str(error)]
    return []
