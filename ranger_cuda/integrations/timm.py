"""timm: its optimizer factory makes Ranger by name."""

from __future__ import annotations

from ..radam import RAdam
from ..ranger import Ranger
from .missing import refuse

# timm takes what follows the last "_" of a name for it: "ranger_cuda" would be its "cuda".
NAMES = {"rangercuda": Ranger, "radamcuda": RAdam}


def register_timm() -> tuple[str, ...]:
    """Give timm's registry of optimizers "rangercuda" and "radamcuda"::

        from ranger_cuda.integrations.timm import register_timm

        register_timm()
        optimizer = timm.optim.create_optimizer_v2(model, opt="rangercuda", lr=4e-3)

    timm's ``weight_decay`` is decoupled for both, as AdamW's; it leaves out what is 1-dimensional.
    ``k``, ``alpha``, ``eval_with_slow_weights`` and all other arguments pass through
    ``create_optimizer_v2``. Registering once more changes nothing.

    Returns:
        The names.

    Raises:
        ModuleNotFoundError: timm 1.0.12 or newer cannot be imported.
        ValueError: the registry has another optimizer of that name. Nothing has been changed then.
    """
    try:
        from timm.optim import list_optimizers
        from timm.optim._optim_factory import OptimInfo, default_registry
    except ImportError as error:
        refuse("register_timm()", "timm", error)
    known = {
        name: default_registry.get_optimizer_info(name).opt_class
        for name in map(str, list_optimizers(list(NAMES)))
    }
    for name, its in known.items():
        if its is not NAMES[name]:
            raise ValueError(
                f"timm has another optimizer called {name!r}: {its}; register "
                "ranger_cuda's yourself, under a name without '_'"
            )
    for name in NAMES.keys() - known.keys():
        default_registry.register(
            OptimInfo(
                name=name,
                opt_class=NAMES[name],
                description="RAdam with Lookahead, fused"
                if name == "rangercuda"
                else "RAdam, fused",
                has_betas=True,
                defaults={"decoupled_weight_decay": True},
            )
        )
    return tuple(NAMES)
