"""
One file for each format in which a Llama is kept. Each has an ordered table of its tensors, which
its reader and its writer share, and offers

    DTYPES                            what --format calls it, and what --dtype may ask of it
    matches(path)                  whether path holds this format, by content
    read(path) -> LazyModel         checks all but the values; reads no weights but to see whether two are tied
    refusal(args) -> str | None       why the format cannot say a model
    write(stored, path, target, dtype)  whole or not at all; one tensor at a time is in memory
"""
