"""The text of a task, for `prune`: its profile, and the routing with and without a set."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..active_set import ActiveSet
from ..runtime.profile import Profile
from ..runtime.sets import ExpertSet
from .calibrate import Collector, Text
from .masked import Masked
from .passes import groups
from .progress import Progress, Silent
from .prune_plan import tokens_to_replay
from .windows import cut

if TYPE_CHECKING:
    from ..engine import Engine


def profile_of_text(
    engine: "Engine", texts: Sequence[Text], fingerprint: str, progress: Progress | None = None
) -> Profile:
    """The statistics of the texts, which are not kept with the store."""
    progress = progress or Silent()
    windows = [window.ids for text in texts for window in cut(text.ids, engine.context)]
    collector = Collector(engine, fingerprint=fingerprint)
    progress.start("calibrate", sum(map(len, windows)), unit="tok")
    for group in groups(windows):
        collector.add(group, progress.advance)
    profile = collector.profile
    profile.texts = [
        {"name": text.name, "sha256": text.sha256, "tokens": len(text.ids)} for text in texts
    ]
    return profile


def routes_of_text(
    engine: "Engine", texts: Sequence[Text], expert_set: ExpertSet
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """Routes [T, places, K] of the beginnings of the texts, so many tokens as are replayed in some
    seconds: by the full model, and with `expert_set` as a hard set."""
    count = max(1, tokens_to_replay(len(engine.args.moe_layers)) // len(texts))
    windows = [window.ids for text in texts for window in cut(text.ids[:count], engine.context)]
    full, hard = Masked(engine, None), Masked(engine, ActiveSet(expert_set, "hard", 0.0))
    return full.routes(windows), hard.routes(windows)
