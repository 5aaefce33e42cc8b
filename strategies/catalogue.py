"""The catalogue of strategies. A new one: a function here, a line in STRATEGIES, a test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from medfl.common.errors import ConfigError
from medfl.common.metrics import known_metrics
from medfl.common.models import model_faults
from medfl.common.noise import Keystream, fresh_key
from medfl.common.options import checked_options
from medfl.common.study import Study
from medfl.strategies.optimisers import (
    adagrad_moment,
    adam_moment,
    adaptive,
    momentum,
    yogi_moment,
)
from medfl.strategies.robust import (
    Rule,
    by_column,
    clipped_to,
    clipped_to_the_median,
    column_median,
    column_trimmed_mean,
    geometric,
    held_together,
    nearest,
)
from medfl.strategies.site_privacy import noised_mean, refuse_unfit
from medfl.strategies.strategy import Local, Strategy, Weighting


def fedavg() -> Strategy:
    """McMahan et al. 2017: the mean of the local models."""
    return Strategy()


def fedprox(*, mu: float = 0.01) -> Strategy:
    """Li et al. 2020, eq. 2: local loss + mu/2 ||w - w_global||^2."""
    return Strategy(local=Local(proximal_mu=mu))


def fedavgm(*, learning_rate: float = 1.0, momentum_beta: float = 0.9) -> Strategy:
    """Hsu et al. 2019: momentum on the server."""
    return Strategy(server_step=momentum(learning_rate, momentum_beta))


def fedadagrad(*, learning_rate: float = 0.1, tau: float = 1e-3) -> Strategy:
    """Reddi et al. 2021: Adagrad on the server."""
    return Strategy(server_step=adaptive(adagrad_moment, learning_rate, 0.0, tau))


def fedadam(
    *, learning_rate: float = 0.1, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
) -> Strategy:
    """Reddi et al. 2021: Adam on the server."""
    step = adaptive(adam_moment(beta_2), learning_rate, beta_1, tau, bias_beta_2=beta_2)
    return Strategy(server_step=step)


def fedyogi(
    *, learning_rate: float = 0.01, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3
) -> Strategy:
    """Reddi et al. 2021: Yogi on the server."""
    return Strategy(server_step=adaptive(yogi_moment(beta_2), learning_rate, beta_1, tau))


def scaffold() -> Strategy:
    """Karimireddy et al. 2020, Algorithm 1 with option II: control variates against drift."""
    return Strategy(local=Local(control_variates=True))


def fedbn() -> Strategy:
    """Li et al. 2021: normalisation layers stay at the hospital."""
    return Strategy(local=Local(keeps="normalisation"))


def local() -> Strategy:
    """No federation: every hospital trains alone, by the same code. The comparison's floor."""
    return Strategy(local=Local(keeps="everything"))


def median() -> Strategy:
    """Yin et al. 2018, Algorithm 1, option I: the median of each number; every site counts once."""
    return _robust(by_column(column_median), 3, "median")


def trimmed_mean(*, faulty: int = 1) -> Strategy:
    """Yin et al. 2018, Algorithm 1, option II: of each number, the mean without the extremes.

    faulty: values left out at either end, which is how many bad sites are stood.
    """
    _at_least("faulty", faulty, 0)
    return _robust(by_column(column_trimmed_mean(faulty)), 2 * faulty + 1, "trimmed_mean")


def krum(*, faulty: int = 1) -> Strategy:
    """Blanchard et al. 2017, section 4: the one update that lies closest to most others.

    faulty: bad sites to be stood; a round needs 2 faulty + 3 updates.
    """
    _at_least("faulty", faulty, 0)
    return _robust(nearest(faulty, 1), 2 * faulty + 3, "krum")


def multi_krum(*, faulty: int = 1, keep: int = 0) -> Strategy:
    """Blanchard et al. 2017, section 5: the mean of the `keep` updates that krum likes best.

    keep: 0 takes n - faulty - 2 of n updates, the number of neighbours that each is judged by.
    """
    _at_least("faulty", faulty, 0)
    _at_least("keep", keep, 0)
    return _robust(nearest(faulty, keep or None), 2 * faulty + 3, "multi_krum")


def geometric_median(*, smoothing: float = 1e-6) -> Strategy:
    """Pillutla et al. 2022 (RFA): the point with the least sum of distances to the updates.

    Distances count by the federation's weighting: bad sites are stood below half of the weight.
    """
    if not smoothing > 0:
        raise ConfigError("federation.options.smoothing: must be above 0; the paper has 1e-6")
    return _robust(geometric(smoothing), 3, "geometric_median")


def norm_clipping(*, bound: float = 0.0) -> Strategy:
    """Sun et al. 2019, section 4.2: the mean of updates that are shortened to at most `bound`.

    bound: L2 norm of an update; 0 takes the median norm of the round.
    """
    _at_least("bound", bound, 0)
    if bound:
        return Strategy(combine=clipped_to(bound), average=_MIDDLE)
    return _robust(clipped_to_the_median, 3, "norm_clipping")


# A few hospitals' running statistics do not decide the model either.
_MIDDLE = held_together(by_column(column_median), 1, "median")


def _robust(rule: Rule, fewest: int, name: str) -> Strategy:
    return Strategy(combine=held_together(rule, fewest, name), average=_MIDDLE, fewest=fewest)


def _at_least(option: str, value: float, least: int) -> None:
    if not value >= least:
        raise ConfigError(f"federation.options.{option}: must be at least {least} (it is {value})")


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "fedavg": fedavg,
    "fedprox": fedprox,
    "fedavgm": fedavgm,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "scaffold": scaffold,
    "fedbn": fedbn,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "norm_clipping": norm_clipping,
    "local": local,
}

# Those that bound what one hospital can do, whatever it sends.
ROBUST = tuple(name for name, made in STRATEGIES.items() if made().average is _MIDDLE)

WEIGHTINGS: dict[str, Weighting] = {
    "cases": float,
    "sqrt_cases": math.sqrt,
    "equal": lambda n_cases: 1.0,
}


def strategy_for(study: Study, key: bytes | None = None) -> Strategy:
    """The study's strategy with its options, and with the noise of [site_privacy].

    key: 32 bytes that decide that noise; whoever knows them can take it off again. None: a fresh
        one that is kept nowhere; a simulation hands one in to be repeated.

    Raises:
        ConfigError: unknown strategy or option, or a strategy that the training or secure
            aggregation cannot serve.
    """
    federation = study.federation
    make = STRATEGIES.get(federation.strategy)
    if make is None:
        raise ConfigError(
            f"federation.strategy: {federation.strategy!r} is not in the catalogue; "
            f"use one of {', '.join(STRATEGIES)}"
        )
    strategy = make(**checked_options(make, federation.options, "federation.options"))
    if strategy.local.control_variates and (
        study.training.optimiser != "sgd" or study.training.momentum != 0
    ):
        raise ConfigError(
            "federation.strategy: scaffold corrects plain SGD steps; set training.optimiser to "
            '"sgd" and training.momentum to 0, or choose another strategy'
        )
    if federation.keep == "average" and strategy.local.keeps != "nothing":
        raise ConfigError(
            f"federation.keep: {federation.strategy} leaves layers at the hospitals, which take no "
            'part in an average; write keep = "last" or "best"'
        )
    if federation.min_sites < strategy.fewest:
        raise ConfigError(
            f"federation.min_sites: {federation.strategy} as it is set needs {strategy.fewest} "
            f"updates a round to stand a bad one; raise min_sites to {strategy.fewest}"
        )
    if faults := _secure_faults(study, strategy):
        raise ConfigError(faults)
    if study.site_privacy is None:
        return strategy
    refuse_unfit(study, strategy)
    normals = Keystream(key or fresh_key(), "site noise").normals
    return replace(strategy, combine=noised_mean(study, normals), compares=False)


def _secure_faults(study: Study, strategy: Strategy) -> list[str]:
    secure, name = study.secure_aggregation, study.federation.strategy
    if secure is None:
        return []
    if not strategy.needs_only_a_sum:
        serving = [n for n, make in STRATEGIES.items() if make().needs_only_a_sum]
        return [
            f"federation.strategy: {name} looks at single updates, and secure aggregation shows "
            f"their sum only; use one of {', '.join(serving)}, or remove [secure_aggregation]"
        ]
    if strategy.local.control_variates != (secure.control_range is not None):
        return [
            "secure_aggregation.control_range: goes with scaffold, which sends control variates; "
            + ("remove it" if secure.control_range else "write what one may change in a round")
        ]
    return []


def study_faults(study: Study) -> list[str]:
    """Names in the study that no catalogue has, one line each; what types alone cannot see."""
    faults = model_faults(study)
    try:
        strategy_for(study)
    except ConfigError as error:
        faults += error.faults
    known = known_metrics(study.task)
    asked = {f"evaluation.metrics.{i}": n for i, n in enumerate(study.evaluation.metrics or [])}
    if study.federation.best_metric is not None:
        asked["federation.best_metric"] = study.federation.best_metric
    return faults + [
        f"{key}: a {study.task.kind} has no metric {name!r}; use one of {', '.join(known)}"
        for key, name in asked.items()
        if name not in known
    ]
