"""Headers of safetensors files: whatever stands there is refused or lies within the file."""

from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.runtime.errors import EdgeMoeError
from edgemoe.runtime.headers import encode_header, read_header


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_fuzzed_header(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    raw = bytearray(
        encode_header([("a", "F32", [2, 3], 24), ("b", "U8", [8], 8)], {"k": "v"}) + bytes(32)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "delete"]))
        if kind == "set":
            raw[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[place + 1 :]
        elif kind == "insert":
            raw[place:place] = data.draw(st.binary(min_size=1, max_size=6))
        elif len(raw) > 1:
            del raw[place]
    path.write_bytes(bytes(raw))
    with open(path, "rb") as file:
        try:
            tensors, _ = read_header(file, str(path))
        except EdgeMoeError:
            return
    assert all(entry.offset + entry.num_bytes <= len(raw) for entry in tensors.values())
