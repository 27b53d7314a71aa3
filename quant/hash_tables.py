"""The tables of hash-routed layers: whole numbers among the weights of a trunk."""

from ..models import names
from ..models.hash_routing import table_fault
from ..runtime.errors import CheckpointError
from .sources import AGAIN
from .store_source import StoreSource, WeightSource


def table_names(source: WeightSource) -> set[str]:
    """Their names in a checkpoint or a store."""
    return names.table_names(source.args, source.module.TRUNK)


def check_tables(source: WeightSource) -> None:
    """Read those of a checkpoint (a store's were checked when it was made, and are when it runs).
    Raises CheckpointError for one that does not name K different experts for every token."""
    if isinstance(source, StoreSource):
        return
    for name in sorted(table_names(source) & source.trunk.keys()):
        table = source.read(source.trunk[name]).numpy()
        if fault := table_fault(table, source.args.num_experts):
            raise CheckpointError(f"the table `{name}` cannot be routed by", fault, AGAIN)
