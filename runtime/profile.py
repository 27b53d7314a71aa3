"""What a model's routers did on some text: the statistics of `edgemoe calibrate`. Floor 0.

A profile is one safetensors file, `STORE/profile.safetensors`, or `STORE/profiles/NAME.safetensors`
for a named task. Everything in it is a sum over tokens (profile_sums.py), so that two profiles of
one model add up to the profile of both texts. The tensors of MoE layer `l` (its number in the
model) are called `layers.{l}.NAME`; all but `hard_count` may be missing. Metadata: `format`,
`version`, and `profile`, a JSON object with num_tokens, top_k, name, fingerprint (of the
checkpoint), tokenizer (sha256) and texts (name, sha256, tokens).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, NotFoundError, UsageError
from .headers import encode_header
from .outputs import replacing
from .profile_sums import STATES, TENSORS, LayerSums
from .transitions import PlaceTables, StateCounts, count_pairs, following_choices, path_keys

FORMAT = "edgemoe-profile"
VERSION = 1
PROFILE_FILE = "profile.safetensors"
PROFILE_FOLDER = "profiles"
_HEAD = ("num_tokens", "top_k", "name", "fingerprint", "tokenizer", "texts", "resume")
_DTYPES = {"<i8": "I64", "<f8": "F64", "<f4": "F32", "<u8": "U64", "<i2": "I16", "<i4": "I32"}


def damaged(path: str | Path, error: Exception) -> FormatError:
    """What to say of a file that holds no whole profile."""
    return FormatError(f"`{path}` is a damaged profile", str(error), "calibrate again")


@dataclass(slots=True)
class Profile:
    """Statistics of one model on one or more texts. `layers`: by number in the model, ascending."""

    layers: dict[int, LayerSums]
    top_k: int
    num_tokens: int = 0
    name: str | None = None
    fingerprint: str = ""  # of the checkpoint; models/fingerprint.py
    tokenizer: str = ""  # sha256 of tokenizer.json, "" where there is none
    texts: list[dict[str, Any]] = field(default_factory=list)
    resume: dict[str, Any] | None = None  # of a calibration that is not finished

    @classmethod
    def empty(cls, num_experts: Mapping[int, int], top_k: int, **head: Any) -> "Profile":
        """No tokens yet, of a model with these experts by layer; `head`: the other fields."""
        sizes = list(num_experts.values())
        layers = {}
        for place, (layer, size) in enumerate(num_experts.items()):
            shape = size, sizes[(place + 1) % len(sizes)]
            layers[layer] = LayerSums(
                np.zeros(size, dtype=np.int64),
                next_count=np.zeros(shape, dtype=np.int64),
                token_count=np.zeros((size, size), dtype=np.int64),
                tokens=StateCounts.empty(len(sizes)),
                paths=StateCounts.empty(len(sizes)),
            )
        return cls(layers, top_k, **head)

    def add_routes(
        self,
        *texts: NDArray[np.integer],
        token_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Count the choices of consecutive tokens of each text: [T, places, K], ascending and
        distinct within a token and layer, then -1, and the T ids of its tokens. Nothing is carried
        from one text to the next."""
        if not texts:
            return
        for place, sums in enumerate(self.layers.values()):
            number, keys, after = sums.num_experts, [], []
            for routes in texts:
                now, following = routes[:, place], following_choices(routes, place, 1)
                source = now[: len(following)]
                sums.hard_count += np.bincount(now[now >= 0], minlength=number)
                sums.next_count += count_pairs(source, following, sums.next_count.shape)
                sums.token_count += count_pairs(now[:-1], now[1:], (number, number))
                before = routes[:, place - 1] if place else routes[:-1, -1]
                skip = 0 if place else 1  # the first layer of the first token has none before it
                keys.append(path_keys(before[: len(following) - skip], source[skip:]))
                after.append(following[skip:])
            sums.paths = sums.paths.add(np.concatenate(keys), np.concatenate(after))
            if token_ids is not None:
                ids = np.concatenate([np.asarray(part, dtype=np.uint64) for part in token_ids])
                chosen = np.concatenate([routes[:, place] for routes in texts])
                sums.tokens = sums.tokens.add(ids, chosen)
        self.num_tokens += sum(map(len, texts))

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Read a file. Raises NotFoundError, or FormatError for anything that is no profile."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise NotFoundError(
                f"no profile at `{path}`", "", "edgemoe calibrate STORE --text FILE makes one"
            )
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = check_metadata(file.metadata(), path)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            profile = cls._parse(json.loads(metadata["profile"]), tensors)
        except FormatError:
            raise
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(path, error) from error
        profile.validate(str(path))
        return profile

    @classmethod
    def _parse(cls, head: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> "Profile":
        by_layer: dict[int, dict[str, NDArray[Any]]] = {}
        for name, tensor in tensors.items():
            _, layer, part = name.split(".")
            by_layer.setdefault(int(layer), {})[part] = tensor
        layers, num_layers = {}, len(by_layer)
        for layer, parts in sorted(by_layer.items()):
            sums: dict[str, Any] = {name: parts[name] for name in TENSORS if name in parts}
            for each, names in STATES.items():
                if names[0] in parts:
                    sums[each] = StateCounts.empty(num_layers)
                    for name in names:
                        setattr(sums[each], name.split("_")[1], parts[name])
            layers[layer] = LayerSums(**sums)
        return cls(
            layers,
            top_k=int(head["top_k"]),
            num_tokens=int(head["num_tokens"]),
            name=head.get("name"),
            fingerprint=str(head.get("fingerprint", "")),
            tokenizer=str(head.get("tokenizer", "")),
            texts=list(head.get("texts", ())),
            resume=head.get("resume"),
        )

    def save(self, path: str | Path, exact: bool = False) -> None:
        """Write the file: to a temporary name, synced, then renamed. `exact`: second moments in
        float64 where they are, for a calibration that goes on later."""
        tensors: dict[str, NDArray[Any]] = {}
        for layer, sums in self.layers.items():
            for name, (dtype, _) in TENSORS.items():
                value = getattr(sums, name)
                if value is not None:
                    kept = value.dtype if exact else dtype
                    tensors[f"layers.{layer}.{name}"] = value.astype(kept, copy=False)
            for each, names in STATES.items():
                states = getattr(sums, each)
                for name in names if states is not None else ():
                    tensors[f"layers.{layer}.{name}"] = getattr(states, name.split("_")[1])
        head = {name: getattr(self, name) for name in _HEAD}
        metadata = {"format": FORMAT, "version": str(VERSION), "profile": json.dumps(head)}
        ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)  # so all are aligned
        entries = [(name, _DTYPES[a.dtype.str], a.shape, a.nbytes) for name, a in ordered]
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # One by one: the library holds a second copy of all.
        with replacing(path) as temporary, open(temporary, "wb") as file:
            file.write(encode_header(entries, metadata))
            for _, array in ordered:
                file.write(np.ascontiguousarray(array).data)

    def merge(self, other: "Profile") -> "Profile":
        """The profile of both texts. Raises UsageError where the two are of different models."""
        if self.top_k != other.top_k or self._num_experts() != other._num_experts():
            raise UsageError(
                "these two profiles are of different models",
                f"experts by layer: {self._num_experts()} and {other._num_experts()}, "
                f"top-k {self.top_k} and {other.top_k}",
            )
        return Profile(
            {layer: sums + other.layers[layer] for layer, sums in self.layers.items()},
            top_k=self.top_k,
            num_tokens=self.num_tokens + other.num_tokens,
            name=self.name if self.name == other.name else None,
            fingerprint=self.fingerprint if self.fingerprint == other.fingerprint else "",
            tokenizer=self.tokenizer if self.tokenizer == other.tokenizer else "",
            texts=[*self.texts, *other.texts],
        )

    def validate(self, where: str = "the profile") -> None:
        """Raises FormatError where shapes do not go together or counts do not add up."""
        layers = list(self.layers.items())
        hidden: int | None = None
        for place, (layer, sums) in enumerate(layers):
            following = layers[(place + 1) % len(layers)][1]
            name = f"{where}: layer {layer}"
            hidden = sums.validate(name, following.num_experts, hidden)
            found = int(sums.hard_count.sum())
            if found > self.num_tokens * self.top_k:  # aliases and null experts make it fewer
                raise FormatError(
                    f"{name}: the counts do not add up",
                    f"expected {self.num_tokens} tokens x {self.top_k} at most, got {found}",
                )

    def check_model(
        self, num_experts: Mapping[int, int], top_k: int, fingerprint: str = ""
    ) -> None:
        """Raises UsageError unless it is of a model with these experts by layer and this K, and,
        where both are known, of this checkpoint."""
        if dict(num_experts) != self._num_experts() or top_k != self.top_k:
            raise UsageError(
                "this profile belongs to another model",
                f"expected {_shape(num_experts)} and top-{top_k}, "
                f"got {_shape(self._num_experts())} and top-{self.top_k}",
                "calibrate this store",
            )
        if fingerprint and self.fingerprint and fingerprint != self.fingerprint:
            raise UsageError(
                "this profile belongs to another checkpoint",
                f"its routers are {self.fingerprint}, this store's {fingerprint}",
                "calibrate this store",
            )

    def popularity(self, place: int) -> NDArray[np.float64]:
        """Share of tokens that choose each expert, [E], of the MoE layer at this place."""
        sums = list(self.layers.values())[place]
        return sums.hard_count / max(1, self.num_tokens)

    def tables(self, place: int, max_entries: int | None = None) -> PlaceTables:
        """What predicts the choices of the MoE layer at `place` from the token's id and the choices
        of the two layers that run before it (in the cycle: before the first comes the last, of the
        token before). `max_entries`: of each table of states; those seen most stay."""
        layers = list(self.layers.values())
        target, source = layers[place], layers[place - 1]
        counts = source.next_count
        if counts is None:
            counts = np.zeros((source.num_experts, target.num_experts), dtype=np.int64)
        none = StateCounts.empty()
        states = [target.tokens or none, source.paths or none]
        if max_entries is not None:
            states = [each.most_seen(max_entries) for each in states]
        return PlaceTables.of(self.popularity(place), self.top_k, counts, *states)

    def _num_experts(self) -> dict[int, int]:
        return {layer: sums.num_experts for layer, sums in self.layers.items()}


def check_metadata(metadata: Mapping[str, str] | None, path: str | Path) -> Mapping[str, str]:
    """The metadata of a profile; raises FormatError for a file that is none, or a newer one."""
    if not metadata or metadata.get("format") != FORMAT:
        raise FormatError(f"`{path}` is no profile")
    if int(metadata["version"]) > VERSION:
        raise FormatError(
            f"`{path}` has profile version {metadata['version']}",
            f"this edgemoe reads up to version {VERSION}",
            "install a newer edgemoe, or calibrate again",
        )
    return metadata


def profile_path(store: str | Path, name: str | None = None) -> Path:
    """Where the profile of a store lies, or the one for a task. Raises UsageError for a name that
    is no file name."""
    if name is None:
        return Path(store) / PROFILE_FILE
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise UsageError(
            f"`{name}` cannot be the name of a profile", "use letters, digits, - and _"
        )
    return Path(store) / PROFILE_FOLDER / f"{name}.safetensors"


def _shape(num_experts: Mapping[int, int]) -> str:
    counts: Sequence[int] = sorted(set(num_experts.values()))
    return f"{len(num_experts)} MoE layers of {' or '.join(map(str, counts)) or 'no'} experts"
