"""What an engine says about itself: nothing falls back silently. Floor 3."""

from typing import TYPE_CHECKING, Any

from .runtime import core
from .runtime.amounts import format_rate
from .runtime.errors import TemplateError

if TYPE_CHECKING:
    from .engine import Engine


def notes_on(engine: "Engine") -> list[str]:
    """One line for each thing that is not as a user would expect it."""
    config, notes = engine.config, []
    if core.lib is None:
        notes.append("no native core: the slow reference runs; reinstall edgemoe")
    elif config.backend == "reference":
        notes.append("the slow reference runs, as asked")
    if not engine.reader.is_direct and config.io != "buffered":
        notes.append(f"expert reads are {engine.reader.io_note}; the page cache grows with them")
    if config.throttle:
        notes.append(f"reads are slowed down to {format_rate(config.throttle)}, as asked")
    if engine.tokenizer is None:
        notes.append("this store has no tokenizer.json: prompts and answers are token ids")
    return notes


def engine_report(engine: "Engine") -> dict[str, Any]:
    """The report as JSON values."""
    config, plan, worker = engine.config, engine.plan, engine.template_worker
    active = engine.active_set
    lent_bytes = engine.lent_memory.lent_bytes if engine.lent_memory is not None else 0
    try:
        template = engine.chat_template.origin
    except TemplateError as error:
        template = f"none: {error.what}"
    return {
        "store": str(engine.path),
        "model_type": engine.args.model_type,
        "backend": config.backend,
        "decode": engine.decode,
        "isa": core.lib.em_isa().decode() if core.lib is not None else None,
        "core": core.library_path,
        "threads": config.threads,
        "io": engine.reader.io_note,
        "direct": engine.reader.is_direct,
        "policy": config.policy,
        "prefetch": engine.prefetch.report(),
        "hash_routed": _hash_routed(engine),
        "context": engine.context,
        "kv_bits": config.kv_bits,
        "budget_bytes": plan.budget_bytes,
        "floor_bytes": plan.floor_bytes,
        "expert_cache_bytes": engine.cache.capacity_bytes,
        "lent_bytes": lent_bytes,  # of expert_cache_bytes, planned for what is to come
        "expert_bytes": plan.max_cache_bytes,
        "knee": engine.governed.governor.to_dict() if engine.governed is not None else None,
        "warm_start": engine.warm_start.to_dict() if engine.warm_start is not None else None,
        "resident": engine.cache.capacity_bytes - lent_bytes >= plan.max_cache_bytes,
        "lossless": engine.routing is None,  # the output is that of the full model, bit for bit
        "set": active.to_dict() if active else None,
        "routing": _routing(engine),
        "memory_bytes": engine.memory_bytes(),
        "chat_template": template,
        "notes": [*engine.notes, *([worker.note] if worker.note else [])],
    }


def _hash_routed(engine: "Engine") -> dict[str, Any] | None:
    """Layers whose experts are known with the token, and what was read of them before their router
    ran; None: there are none."""
    if not engine.args.hash_layers:
        return None
    num_reads, num_in_time = getattr(engine.cache, "foreseen", (0, 0))  # the reference has none
    return {
        "layers": list(engine.args.hash_layers),
        "early_reads": num_reads,
        "early_in_time": num_in_time,
    }


def _routing(engine: "Engine") -> dict[str, Any] | None:
    """What changes routes and how often it did, None: nothing does."""
    change = engine.routing
    if change is None:
        return None
    counts = engine.routing_counts()
    return {
        **change.routing.to_dict(),
        "label": change.label,
        "mean_active_experts": counts.mean_active,
        "dropped": counts.num_dropped,
        "stand_ins": counts.num_stand_ins,
    }
