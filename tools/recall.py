"""Recall of the predictors on held-out text: share of the experts wanted among the n likeliest.

    python tools/recall.py [STORE] --text FILE ... [--tokens 2048] [--profile FILE] [--json]

One row per layer. Beside every predictor a control: the predictions of another token, which is what
knowing the layer alone gives. `own` is the layer's router on its own input, which has to be 1 (in a
store of merged experts nearly: rows are chosen, and the experts they stand for ranked by sums).
Statistical tables come from STORE/profile.safetensors or --profile, made from other text.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from edgemoe import Engine
from edgemoe.kv_cache import KVCache
from edgemoe.models.lookahead import observe_routers
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.predictors import Recall, score, score_texts
from edgemoe.runtime.profile import PROFILE_FILE, Profile

DEPTH = 2
PIECE_TOKENS = 512


def pieces(engine: Engine, texts: list[str], num_tokens: int) -> list[list[int]]:
    """Token ids in pieces of at most a context, the same share of every text."""
    tokenizer, size = engine.need_tokenizer(), min(PIECE_TOKENS, engine.context)
    found = []
    for text in texts:
        ids = tokenizer.encode(text)[: num_tokens // len(texts)]
        found += [ids[at : at + size] for at in range(0, len(ids), size)]
    found = [ids for ids in found if len(ids) > 1]
    if not found:
        raise UsageError("there is no text to predict", "give a longer --text")
    return found


def measure(engine: Engine, samples: list[list[int]], profile: Profile | None) -> list[Recall]:
    """Every predictor at every layer, at n = K and 2 K."""
    args = engine.args
    ns = (args.top_k, 2 * args.top_k)
    texts, scores = [], []
    for ids in samples:
        kv_cache = KVCache.for_model(args, engine.context, 16)
        with engine.steps() as layers:
            routes, observed = observe_routers(layers, np.array(ids), kv_cache, DEPTH)
        texts.append(routes)
        scores.append(observed)
    moe_layers = list(args.moe_layers)
    experts = [engine._index.layer_to_num_experts[layer] for layer in moe_layers]
    found = score_texts(texts, list(map(np.array, samples)), moe_layers, experts, ns, profile)
    names = {0: "own", **{depth: f"router {depth}" for depth in range(1, DEPTH + 1)}}
    for place, layer in enumerate(moe_layers):
        chosen = np.concatenate([routes[:, place] for routes in texts])
        for depth, name in names.items():
            if depth in scores[0][place]:
                rows = np.concatenate([each[place][depth] for each in scores])
                found.append(score(name, layer, rows, chosen, ns))
    return found


def table(results: list[Recall]) -> str:
    """Rows by layer, columns by predictor: recall at K (control), recall at 2 K."""
    names = list(dict.fromkeys(each.predictor for each in results))
    cells = {(each.layer, each.predictor): each for each in results}
    lines = ["| layer | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for layer in sorted({each.layer for each in results}):
        row = [str(layer)]
        for name in names:
            each = cells.get((layer, name))
            row.append("-" if each is None else _cell(each))
        lines.append("| " + " | ".join(row) + " |")
    means = []
    for name in names:
        of_name = [each for each in results if each.predictor == name]
        means.append(
            " ".join(
                f"{np.mean([list(e.at.values())[i] for e in of_name]):.3f}"
                if i == 1
                else f"{np.mean([list(e.at.values())[i] for e in of_name]):.3f} "
                f"({np.mean([list(e.shuffled.values())[i] for e in of_name]):.3f})"
                for i in range(2)
            )
        )
    return "\n".join([*lines, "| mean | " + " | ".join(means) + " |"])


def _cell(each: Recall) -> str:
    first, second = each.at.values()
    return f"{first:.3f} ({next(iter(each.shuffled.values())):.3f}) {second:.3f}"


def main() -> None:
    """Print the table or the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", nargs="?", help="a store; the bundled demo model if left out")
    parser.add_argument("--text", nargs="+", required=True, type=Path, help="held-out text")
    parser.add_argument("--tokens", type=int, default=2048, help="how many in all")
    parser.add_argument("--profile", type=Path, help="instead of the one in the store")
    parser.add_argument("--memory", help="as for `edgemoe run`")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    options = {"memory": given.memory, "context": PIECE_TOKENS, "warm_start": "off"}
    with Engine.from_pretrained(given.store, **options) as engine:
        path = given.profile or engine.path / PROFILE_FILE
        profile = Profile.load(path) if given.profile or path.is_file() else None
        if profile is not None:
            args = engine.args
            sizes = {layer: engine._index.layer_to_num_experts[layer] for layer in args.moe_layers}
            profile.check_model(sizes, args.top_k)
        texts = [path.read_text(encoding="utf-8") for path in given.text]
        samples = pieces(engine, texts, given.tokens)
        results = measure(engine, samples, profile)
    if given.json:
        document = {
            "tokens": sum(map(len, samples)),
            "results": [each.to_dict() for each in results],
        }
        print(json.dumps(document, indent=1))
    else:
        print(table(results))


if __name__ == "__main__":
    main()
