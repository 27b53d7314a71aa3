"""Tables as people read them."""

from edgemoe.cli.render import table

HEADER = ("arm", "tok/s", "read/token", "hit")
ROWS = [("50%", 12.5, "105 MiB", "74 %"), ("100%", 33.6, "0 B", "100 %")]


def test_a_table_fits_a_narrow_terminal() -> None:
    whole = table(ROWS, HEADER, width=80).splitlines()
    assert whole == table(ROWS, HEADER).splitlines() and len(whole) == 4
    wide = len(whole[1])
    assert table(ROWS, HEADER, width=wide).splitlines() == whole
    for width in range(16, wide):
        blocks = [block.splitlines() for block in table(ROWS, HEADER, width=width).split("\n\n")]
        assert len(blocks) > 1 and all(len(line) <= width for block in blocks for line in block)
        columns = [name for block in blocks for name in block[0].split()[1:]]
        assert tuple(columns) == HEADER[1:]  # each once, in order
        assert all(block[0].startswith("arm") and block[3].startswith("100%") for block in blocks)
    assert len(table(ROWS, HEADER, width=1).split("\n\n")) == 3
