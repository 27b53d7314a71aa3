"""`edgemoe trace record STORE --out FILE`: write down what the routers choose."""

import argparse
import json

from ..runtime.errors import UsageError
from ..runtime.outputs import need_place
from . import options
from .render import note, open_output, print_notes

USAGE = "%(prog)s [MODEL] (--text FILE | --prompt TEXT) --out FILE"
EPILOG = """A text is recorded as decoded tokens, in windows of the context: the routes of a token
are the same whether it was read or written. A prompt is recorded as prefill, the answer to it
(greedy, at most --tokens) as decoded tokens.

  edgemoe trace record olmoe.edgemoe --text wiki.txt --out wiki.trace
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--out", metavar="FILE", help="the trace, a safetensors file")
    parser.add_argument("--text", metavar="FILE", help="a text to read, or token ids as .npy")
    parser.add_argument("--prompt", metavar="TEXT", help="a prompt to answer")
    parser.add_argument("--raw", action="store_true", help="--prompt without the chat template")
    parser.add_argument(
        "--tokens", type=options.count, metavar="N", help="at most (default: the text; 256 new)"
    )
    options.add_engine_options(parser)
    parser.add_argument("--json", action="store_true", help="what was recorded, as JSON")


def run(args: argparse.Namespace) -> int:
    path = options.model_path(args)
    if (args.text is None) == (args.prompt is None):
        raise UsageError("expected either --text FILE or --prompt TEXT")
    if args.out is None:
        raise UsageError("no --out FILE given", "", "name the file to write: --out NAME.trace")
    need_place(args.out)
    open_output()
    from ..engine import Engine
    from ..quant.windows import read_tokens
    from ..recorder import Recorder
    from ..sampling import SamplingParams

    with Engine.from_pretrained(path, **options.engine_arguments(args)) as engine:
        print_notes(engine, args.verbose)
        recorder = Recorder(engine)
        try:
            if args.text is not None:
                ids = read_tokens(args.text, engine.tokenizer)[: args.tokens]
                if not ids:
                    raise UsageError(f"`{args.text}` holds no text")
                recorder.read(ids)
            else:
                prompt = args.prompt if args.raw else [{"role": "user", "content": args.prompt}]
                limit = args.tokens or 256
                recorder.answer(prompt, SamplingParams(max_tokens=limit, temperature=0.0))
        except KeyboardInterrupt:
            note("interrupted; what was finished is kept")
            recorder.trace().save(args.out)
            raise
        trace = recorder.trace()
    trace.save(args.out)
    document = {
        "file": str(args.out),
        "model": trace.model,
        "num_steps": trace.num_steps,
        "num_decoded": int((trace.phase == 1).sum()),
        "num_places": trace.num_places,
        "top_k": trace.experts.shape[2],
    }
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        print(
            f"{args.out}: {trace.num_steps} tokens ({document['num_decoded']} decoded), "
            f"{trace.num_places} layers, {document['top_k']} experts a layer"
        )
    return 0
