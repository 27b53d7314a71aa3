"""The sums of a profile, layer by layer. Floor 0.

Letters: E experts of the layer, E' of the next MoE layer, D hidden, F expert width, K experts of a
token, N observed paths.

- hard_count i64 [E]: tokens that chose the expert; adds up to num_tokens * K
- soft_count f64 [E]: sum of the router's full softmax
- weight_sum f64 [E]: sum of the routing weights of those tokens
- reap_sum f64 [E]: sum of routing weight * L2 norm of the expert's output (REAP, 2510.13999)
- input_square_sum f32 [E, D]: sum of squares of what went into the expert; hidden_square_sum f32
  [E, F]: of what went into its down projection
- logit_gram f64 [E, E]: H^T H of the router's logits H [tokens, E] (UNCURL, 2409.01483)
- error_count i64 [E]: the tokens that errors were measured on; output_square_sum f64 [E]: sum of
  squares of routing weight * the expert's output over those; error_square_sum f64 [E, B]: the same
  of what the output loses with the weights rounded to nearest at each of ERROR_BITS
- next_count i64 [E, E']: choices of this layer x choices of the next MoE layer for the same token;
  the last layer is followed by the first one of the next token
- token_count i64 [E, E]: choices of a token x choices of the token after it, in this layer
- id_key u64 [N], id_expert i16 [N], id_count i32 [N]: how often a token id was given to an expert;
  sorted by (key, expert)
- path_key, path_expert, path_count: the same for EdgeMoE's order 2 (2308.14352): how often a state
  of the MoE layer before this one and of this one was followed by an expert of the next; a key is
  `path_keys` of the choices of the two layers
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError
from .transitions import StateCounts

_INT, _REAL = np.dtype(np.int64), np.dtype(np.float64)
_SINGLE = np.dtype(np.float32)
ERROR_BITS = (2, 3, 4)  # in groups of 64 columns, or what divides them
# name -> dtype in the file, letters of the shape; `e` are the experts of the next layer
TENSORS: dict[str, tuple[np.dtype[Any], str]] = {
    "hard_count": (_INT, "E"),
    "soft_count": (_REAL, "E"),
    "weight_sum": (_REAL, "E"),
    "reap_sum": (_REAL, "E"),
    "input_square_sum": (_SINGLE, "ED"),
    "hidden_square_sum": (_SINGLE, "EF"),
    "logit_gram": (_REAL, "EE"),
    "error_count": (_INT, "E"),
    "output_square_sum": (_REAL, "E"),
    "error_square_sum": (_REAL, "EB"),
    "next_count": (_INT, "Ee"),
    "token_count": (_INT, "EE"),
}
STATES = {  # field -> its tensors
    "tokens": ("id_key", "id_expert", "id_count"),
    "paths": ("path_key", "path_expert", "path_count"),
}


@dataclass(slots=True)
class LayerSums:
    """The sums of one layer; see the module's docstring. Only `hard_count` is always there."""

    hard_count: NDArray[np.int64]
    soft_count: NDArray[np.float64] | None = None
    weight_sum: NDArray[np.float64] | None = None
    reap_sum: NDArray[np.float64] | None = None
    input_square_sum: NDArray[np.floating] | None = None
    hidden_square_sum: NDArray[np.floating] | None = None
    logit_gram: NDArray[np.float64] | None = None
    error_count: NDArray[np.int64] | None = None
    output_square_sum: NDArray[np.float64] | None = None
    error_square_sum: NDArray[np.float64] | None = None
    next_count: NDArray[np.int64] | None = None
    token_count: NDArray[np.int64] | None = None
    tokens: StateCounts | None = None
    paths: StateCounts | None = None

    @property
    def num_experts(self) -> int:
        return len(self.hard_count)

    def __add__(self, other: "LayerSums") -> "LayerSums":
        """The sums of both; what only one of them has is left out."""
        sums: dict[str, Any] = {}
        for name in (each.name for each in fields(self)):
            ours, theirs = getattr(self, name), getattr(other, name)
            sums[name] = None if ours is None or theirs is None else ours + theirs
        return LayerSums(**sums)

    def validate(self, where: str, num_following: int, hidden: int | None) -> int | None:
        """Check shapes and ranges, E' being `num_following` and D `hidden` where it is known;
        returns D. Raises FormatError."""
        sizes = {"E": self.num_experts, "e": num_following, "D": hidden, "F": None}
        sizes["B"] = len(ERROR_BITS)
        for name, (dtype, letters) in TENSORS.items():
            value = getattr(self, name)
            if value is None:
                continue
            for letter, size in zip(letters, value.shape, strict=False):
                sizes[letter] = size if sizes[letter] is None else sizes[letter]
            expected = tuple(sizes[letter] for letter in letters)
            if value.shape != expected or value.dtype.kind != dtype.kind:
                raise FormatError(
                    f"{where}: `{name}` has an unexpected shape or type",
                    f"expected {dtype} {list(expected)}, got {value.dtype} {list(value.shape)}",
                )
            if not np.isfinite(value).all() or (name != "logit_gram" and (value < 0).any()):
                raise FormatError(f"{where}: `{name}` holds no sums of counts")
        if self.tokens is not None:
            self.tokens.validate(where, self.num_experts)
        if self.paths is not None:
            self.paths.validate(where, num_following)
        return sizes["D"]
