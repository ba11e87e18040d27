"""
Model formats: one module per format; registry.py lists the modules.

To add a format, write a module with the following names and list it in registry.FORMATS before
llama2c, which comes last because the first version of model.bin has no magic number:

    DTYPES                              values of --format that the module writes, each with the
                                        values of --dtype that it supports
    matches(path) -> bool               whether path has this format, judged by its content
    read(path) -> LazyModel             validates everything but the values of the weights;
                                        reads weights only to detect tied embeddings
    unsupported_reason(args) -> str | None
                                        why the format cannot store a model with these ModelArgs
    check_metadata(metadata, tokenizer) -> list[str]
                                        the names of what the format cannot store of a
                                        ModelMetadata; raises ValueError if its readers would
                                        misuse the model without it
    write(model, path, target, dtype)   writes a LazyModel atomically, with one tensor at a time
                                        in memory; target is a key of DTYPES

registry.Format is this interface as a typing.Protocol. Reader and writer of a module use the same
ordered table of tensor names. CONTRIBUTING.md lists all steps.
"""
