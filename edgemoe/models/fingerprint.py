"""Which checkpoint a store was made of, whatever its bits. No torch.

The routers tell: they are stored as they came, they differ between any two trainings, and expert
ids (of a profile, a trace, a pruned set) mean something for one set of routers only.
"""

import hashlib

from ..runtime.errors import FormatError
from ..runtime.headers import read_header
from ..runtime.index import TRUNK_FILE, StoreIndex
from . import load_module
from .names import spellings


def checkpoint_fingerprint(index: StoreIndex) -> str:
    """32 hexadecimal digits that the stores of one checkpoint share; reads the routers.

    A set or a profile names it, and is refused for a store that has another. Raises FormatError
    where the trunk has no router, UnsupportedModelError.
    """
    path, table = index.path / TRUNK_FILE, load_module(index.model_type).TRUNK
    digest = hashlib.sha256(f"{index.model_type} {index.hidden}".encode())
    with open(path, "rb") as file:
        tensors, _ = read_header(file, str(path))
        for layer in index.layer_to_num_experts:
            for slot in ("layer.router", "layer.experts_of_token"):
                name = spellings(table, slot, layer)[0]
                if name not in tensors:
                    if slot != "layer.router":
                        continue  # not hash-routed
                    raise FormatError(f"`{path}` has no tensor `{name}`")
                entry = tensors[name]
                digest.update(f"{layer} {entry.dtype} {list(entry.shape)}".encode())
                file.seek(entry.offset)
                digest.update(file.read(entry.num_bytes))
            if layer in index.layer_to_bodies:  # what an id stands for
                digest.update(f"{list(index.layer_to_bodies[layer])}".encode())
    return digest.hexdigest()[:32]
