"""What a step holds beside weights, keys and values. Floor 0."""

from typing import TYPE_CHECKING

from . import core
from .format import PAGE_BYTES, round_up
from .index import StoreIndex

if TYPE_CHECKING:
    from .budget import ModelDims


def wave_pairs(chunk: int, top_k: int) -> int:
    """The most (token, expert) pairs that the executor gives to one native call."""
    return max(2 * chunk, top_k)


def moe_workspace_bytes(num_tokens: int, num_pairs: int, hidden: int, row_floats: int) -> int:
    """Bytes of the executor's workspace for calls up to this size, of records whose layouts have
    at most so many `row_floats`."""
    if core.lib is not None:
        return 4 * core.lib.em_moe_workspace_floats(num_tokens, num_pairs, hidden, row_floats)
    return 4 * (num_pairs * hidden + num_tokens * (row_floats + hidden)) + 12 * hidden * row_floats


def prompt_buffers(
    dims: "ModelDims", index: StoreIndex, num_tokens: int, chunk: int
) -> tuple[int, int]:
    """What a step of so many tokens holds in the executor's workspace, where a prompt is cut into
    chunks of `chunk`, and in the core's scratch; bytes."""
    row_floats = max((each.layout.row_floats for each in index.records.values()), default=0)
    num_pairs = min(num_tokens * dims.top_k, wave_pairs(chunk, dims.top_k))
    workspace = moe_workspace_bytes(num_tokens, num_pairs, dims.hidden, row_floats)
    floats = 2 * (dims.num_heads + dims.num_kv_heads) * dims.head_dim + dims.hidden
    if dims.dense_width:
        floats += 3 * dims.dense_width + dims.hidden
    floats += max(index.layer_to_num_rows.values(), default=0)
    return round_up(workspace, PAGE_BYTES), round_up(4 * num_tokens * floats, PAGE_BYTES)
