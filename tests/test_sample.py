import copy
import functools
import json
import math

import pytest
import torch

from checkpoints.file import save_checkpoint, write_model_args
from configurator import configure
from formats import llama2c
from formats.lazy_model import from_model
from generation.beam_search import BeamSearchParams, beam_search
from generation.engine import generate_tokens
from model import ModelArgs, Transformer
from runtime.atomic_files import write_atomically
from sample import SampleConfig
from textdata.prompts import read_prompts
from textdata.tokenizer import load_tokenizer, train_sentencepiece


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(
        ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, max_seq_len=32)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def out_dir(model, tokenizer, tmp_path_factory) -> str:
    """What a training run leaves."""
    folder = tmp_path_factory.mktemp("out")
    checkpoint = dict(model=model.state_dict(), model_args=write_model_args(model.args), iter_num=0)
    save_checkpoint(str(folder / "ckpt.pt"), checkpoint | dict(tokenizer_hash=tokenizer.hash))
    llama2c.write(from_model(model), str(folder / "model.bin"))
    write_atomically(str(folder / "tokenizer.model"), tokenizer.content)
    return str(folder)


@pytest.fixture
def run_sample(run_script):
    """run_sample("--seed=1", ...) runs the script in this process; returns (status, stdout,
    stderr)."""
    return functools.partial(run_script, "sample.py", "--device=cpu", "--max_new_tokens=40")


def text_of(output: str) -> str:
    """The output without the list of options."""
    return "\n".join(line for line in output.split("\n") if not line.endswith("  (command line)"))


def records(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def split_samples(output: str) -> list[str]:
    return text_of(output).removesuffix("\n").split("\n---------------\n")


# The real command


def test_the_command_prints_the_prompt_and_its_completion(run_script, out_dir, model, tokenizer):
    options = ["--start=Zoë saw", "--temperature=0", "--max_new_tokens=60", "--device=cpu"]
    env = {"PYTHONUTF8": "1", "PYTHONPROFILEIMPORTTIME": "1"}
    result = run_script("sample.py", f"--out_dir={out_dir}", *options, env=env)
    prompt = tokenizer.encode("Zoë saw", bos=True)
    stop_ids = {tokenizer.bos_id, tokenizer.eos_id}
    tokens = generate_tokens(model, prompt, stop_ids=stop_ids, max_new_tokens=60, temperature=0)
    assert result.returncode == 0, result.stderr
    assert text_of(result.stdout) == tokenizer.decode([*prompt, *tokens]) + "\n"
    assert text_of(result.stdout).startswith("Zoë saw")
    assert "tokens/s on cpu" in result.stderr
    lines = result.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    others = [line for line in lines if line and not line.startswith("import time:")]
    assert len(others) == 1  # no warning
    assert "torch" in imported
    assert not {"torch._dynamo", "sympy"} & imported  # they would take a second


def test_a_character_unknown_to_the_terminal_is_replaced(run_script, out_dir):
    """As where output goes to a file on Windows, in the code page of the system."""
    options = (f"--out_dir={out_dir}", "--start=Zoë saw", "--max_new_tokens=5", "--device=cpu")
    result = run_script("sample.py", *options, env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert text_of(result.stdout).startswith("Zo")


def test_without_a_model_the_command_ends_with_one_sentence(run_script):
    result = run_script("sample.py")
    assert result.returncode == 1
    assert "out/ckpt.pt" in result.stderr and len(result.stderr.splitlines()) == 1


# Samples and prompts


def test_the_seed_decides_the_samples(run_sample, out_dir):
    outputs = [
        run_sample(f"--out_dir={out_dir}", "--start=Once", f"--seed={seed}")[1]
        for seed in (1, 1, 2)
    ]
    first, again, other = map(text_of, outputs)
    assert first == again != other


def test_several_samples_differ_and_begin_with_the_prompt(run_sample, out_dir):
    status, output, _ = run_sample(f"--out_dir={out_dir}", "--start=Once", "--num_samples=3")
    samples = split_samples(output)
    assert status == 0 and len(set(samples)) == len(samples) == 3
    assert all(text.startswith("Once") for text in samples)


def test_the_prompt_may_be_in_a_file(run_sample, out_dir, tmp_path):
    (tmp_path / "start.txt").write_text("Zoë had a red ball.\nShe", encoding="utf-8")
    status, output, _ = run_sample(f"--out_dir={out_dir}", f"--start=FILE:{tmp_path}/start.txt")
    assert status == 0
    assert text_of(output).startswith("Zoë had a red ball.\nShe")


def test_standard_input_has_one_prompt_per_line(run_sample, out_dir):
    """A prompt's samples are the same as when it is the only prompt."""
    options = (f"--out_dir={out_dir}", "--format=jsonl", "--num_samples=2")
    status, output, _ = run_sample(*options, "--start=-", stdin="Once\nZoë saw\r\n")
    samples = records(output)
    assert status == 0
    assert [record["prompt"] for record in samples] == ["Once", "Once", "Zoë saw", "Zoë saw"]
    assert samples[:2] == records(run_sample(*options, "--start=Once")[1])
    assert samples[2:] == records(run_sample(*options, "--start=Zoë saw")[1])


BAD_INPUTS = [
    (b"", "standard input is empty"),
    (b"\xff\xfe", "standard input: not UTF-8"),
]


@pytest.mark.parametrize("content, message", BAD_INPUTS)
def test_standard_input_must_hold_text(content, message, run_sample, out_dir):
    status, _, error = run_sample(f"--out_dir={out_dir}", "--start=-", stdin=content)
    assert status == 1 and message in error and len(error.splitlines()) == 1


def test_only_a_newline_ends_a_prompt(run_sample, out_dir):
    options = (f"--out_dir={out_dir}", "--start=-", "--format=jsonl")
    samples = records(run_sample(*options, stdin="a\u2028b\x0cc\n\nd")[1])
    assert [record["prompt"] for record in samples] == ["a\u2028b\x0cc", "", "d"]


def test_closed_standard_input_is_reported_in_one_sentence(run_sample, out_dir):
    status, _, error = run_sample(f"--out_dir={out_dir}", "--start=-", stdin=None)
    assert status == 1 and "standard input is empty" in error and len(error.splitlines()) == 1


# Output formats


def test_jsonl_is_one_record_per_sample_only(run_sample, out_dir, tokenizer):
    options = (f"--out_dir={out_dir}", "--start=Once", "--num_samples=3")
    status, output, _ = run_sample(*options, "--format=jsonl")
    samples = records(output)
    as_text = split_samples(run_sample(*options)[1])
    assert status == 0 and [record["prompt"] + record["text"] for record in samples] == as_text
    prompt_ids = tokenizer.encode("Once", bos=True)
    for record in samples:
        assert tokenizer.decode([*prompt_ids, *record["tokens"]]) == "Once" + record["text"]
        assert record["finish"] == ("length" if len(record["tokens"]) == 40 else "stop")


def test_samples_do_not_depend_on_the_batch_size(run_sample, out_dir):
    """--format=events interleaves all samples; joined, its chunks are the samples of jsonl."""
    options = (f"--out_dir={out_dir}", "--start=-", "--num_samples=2", "--stop=a", "--stop=e")
    outputs = []
    for output_format, batch_size in (("jsonl", 1), ("jsonl", 4), ("events", 4)):
        format_options = (f"--format={output_format}", f"--batch_size={batch_size}")
        result = run_sample(*options, *format_options, stdin="Once\nZoë saw a dog and a cat\n\n")
        outputs.append(records(result.stdout))
    alone, batch, events = outputs
    assert alone == batch and len(alone) == 6
    texts, order = {}, []
    for event in events:
        order.append((event["prompt"], event["sample"]))
        texts[order[-1]] = texts.get(order[-1], "") + event["text"]
    assert [texts[key] for key in sorted(texts)] == [record["text"] for record in alone]
    assert order != sorted(order)


# Beam search


def test_beams_print_the_best_hypotheses_with_scores(run_sample, out_dir, model, tokenizer):
    options = (f"--out_dir={out_dir}", "--start=Once", "--num_beams=4", "--num_samples=3")
    options += ("--max_new_tokens=9", "--length_penalty=0")
    status, output, _ = run_sample(*options, "--format=jsonl", "--logprobs=True")
    samples = records(output)
    params = BeamSearchParams(4, max_new_tokens=9, length_penalty=0.0, num_best=3)
    prompt_ids = tokenizer.encode("Once", bos=True)
    expected = beam_search(model, prompt_ids, params, tokenizer.stop_ids)
    assert status == 0
    assert [record["tokens"] for record in samples] == [best.tokens for best in expected]
    scores = sorted((best.score for best in expected), reverse=True)
    # Packed matrices sum in another order.
    assert [record["score"] for record in samples] == pytest.approx(scores, rel=1e-5)
    for record in samples:
        if record["finish"] == "length":
            assert sum(record["logprobs"]) == pytest.approx(record["score"], abs=1e-3)
    as_text = split_samples(run_sample(*options)[1])
    assert as_text == ["Once" + record["text"] for record in samples]


def test_beams_and_their_tokens_end_at_a_stop_string(run_sample, out_dir, tokenizer):
    options = (f"--out_dir={out_dir}", "--start=Once", "--num_beams=3", "--format=jsonl")
    unstopped = records(run_sample(*options)[1])[0]
    stop = unstopped["text"][8:11]
    (stopped,) = records(run_sample(*options, f"--stop={stop}")[1])
    assert stopped["text"] == unstopped["text"][: unstopped["text"].find(stop)]
    assert stopped["finish"] == "stop"
    count = len(stopped["tokens"])
    assert stopped["tokens"] == unstopped["tokens"][:count] and count < len(unstopped["tokens"])
    assert stop in tokenizer.decode([*tokenizer.encode("Once", bos=True), *stopped["tokens"]])


# Speed


FAST_OPTIONS = [
    "--quantize=int8",
    pytest.param("--compile=True", marks=pytest.mark.slow),
    "--batch_size=1",
]


@pytest.mark.parametrize("option", FAST_OPTIONS)
def test_fast_options_generate_too(option, run_sample, out_dir):
    options = (f"--out_dir={out_dir}", "--start=Once", "--min_new_tokens=20", "--format=jsonl")
    (plain,) = records(run_sample(*options)[1])
    (fast,) = records(run_sample(*options, option)[1])
    assert plain["prompt"] == fast["prompt"] and len(fast["tokens"]) > 5
    assert option == "--quantize=int8" or plain == fast


def test_bfloat16_generates(run_sample, out_dir):
    assert run_sample(f"--out_dir={out_dir}", "--dtype=bfloat16", "--start=Once")[0] == 0


# Interactive mode


def test_interactive_drops_what_follows_a_stop_string(run_sample, out_dir):
    options = (f"--out_dir={out_dir}", "--temperature=0", "--max_new_tokens=12")
    options += ("--interactive=True",)
    first, _ = text_of(run_sample(*options, stdin="Once\n\n")[1]).removesuffix("\n").split("\n")
    stop = first[-3:]
    result = run_sample(*options, f"--stop={stop}", stdin="Once\nthere\n")
    stopped, _ = text_of(result.stdout).split("\n", 1)
    assert stopped == first[: first.find(stop, len("Once"))]


def test_interactive_continues_the_text(run_sample, out_dir):
    """As if its beginning had been the prompt."""
    options = (f"--out_dir={out_dir}", "--temperature=0")
    eight, sixteen = "--max_new_tokens=8", "--max_new_tokens=16"
    typed = "Zoë saw\n\na dog\n"
    status, output, error = run_sample(*options, eight, "--interactive=True", stdin=typed)
    first, second, third = text_of(output).removesuffix("\n").split("\n")
    assert status == 0 and "24 tokens" in error
    assert first == text_of(run_sample(*options, eight, "--start=Zoë saw")[1]).strip("\n")
    longer = text_of(run_sample(*options, sixteen, "--start=Zoë saw")[1]).strip("\n")
    assert first + second == longer and third.startswith(" a dog")


# Constraints


def test_a_stop_string_ends_a_sample_and_is_not_printed(run_sample, out_dir):
    options = (f"--out_dir={out_dir}", "--start=Once", "--temperature=0")
    text = records(run_sample(*options, "--format=jsonl")[1])[0]["text"]
    stop = text[9:13]
    stopped = records(run_sample(*options, "--format=jsonl", "--stop=zzz", f"--stop={stop}")[1])[0]
    assert stopped["text"] == text[: text.find(stop)] and stopped["finish"] == "stop"
    assert len(stopped["tokens"]) < 40
    as_text = text_of(run_sample(*options, f"--stop={stop}")[1])
    assert stop not in as_text.removeprefix("Once")


def test_bad_words_appear_in_no_sample(run_sample, out_dir):
    options = (f"--out_dir={out_dir}", "--start=Once", "--format=jsonl", "--num_samples=5")
    options += ("--top_k=0",)
    free = "".join(record["text"] for record in records(run_sample(*options)[1]))
    pairs = [free[index : index + 2] for index in range(0, len(free) - 1, 5)]
    words = [pair for pair in pairs if not {"\\", "\ufffd"} & set(pair)][:5]
    samples = records(run_sample(*options, *(f"--bad_words={word}" for word in words))[1])
    assert words and len(samples) == 5
    assert not [word for word in words if any(word in record["text"] for record in samples)]


@pytest.mark.parametrize("name", ["bos_id", "eos_id"])
def test_bos_and_eos_end_a_sample(name, run_sample, tokenizer, tokenizer_path, tmp_path):
    """The likeliest token of this model is always the same."""
    shape = dict(dim=4, n_layers=1, n_heads=1, vocab_size=512, max_seq_len=32)
    model = Transformer(ModelArgs(**shape, tie_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.tok_embeddings.weight.fill_(1)
        model.norm.weight.fill_(1)
        model.output.weight[getattr(tokenizer, name)] = 1
    llama2c.write(from_model(model), str(tmp_path / "model.bin"))
    options = (f"--init_from={tmp_path}/model.bin", f"--tokenizer={tokenizer_path}")
    status, output, error = run_sample(*options, "--temperature=0", "--start=The end")
    assert status == 0 and text_of(output) == "The end\n"
    assert "\n0 tokens" in error


@pytest.mark.parametrize("beams", [1, 4])
def test_stop_ids_end_a_sample(beams, run_sample, out_dir):
    """A token without text could not end a sample: --stop never saw it."""
    options = (f"--out_dir={out_dir}", "--start=Once", "--format=jsonl", f"--num_beams={beams}")
    options += ("--num_samples=4", "--max_new_tokens=20")
    samples = [record["tokens"] for record in records(run_sample(*options)[1])]
    stop = max(samples, key=len)[-1]
    stopped = records(run_sample(*options, "--stop_ids=511", f"--stop_ids={stop}")[1])
    assert len(stopped) == 4 and not any({stop, 511} & {*record["tokens"]} for record in stopped)
    if beams == 1:  # beam search finds other texts instead
        ends = [next((i for i, t in enumerate(ids) if t in (stop, 511)), None) for ids in samples]
        cut = [ids[:end] for ids, end in zip(samples, ends, strict=True)]
        assert [record["tokens"] for record in stopped] == cut


def test_a_stop_id_beyond_the_vocabulary_is_refused(run_sample, out_dir):
    status, _, error = run_sample(f"--out_dir={out_dir}", "--stop_ids=2", "--stop_ids=512")
    assert status == 1 and "--stop_ids=512: the ids of this model's tokens are 0 to 511" in error


# Log-probabilities and scores


def test_logprobs_of_a_sample_are_those_of_the_model(run_sample, out_dir, model, tokenizer):
    options = (f"--out_dir={out_dir}", "--start=Once", "--logprobs=True", "--min_new_tokens=40")
    (record,) = records(run_sample(*options, "--format=jsonl")[1])
    prompt_ids = tokenizer.encode("Once", bos=True)
    tokens = [*prompt_ids, *record["tokens"]][:32]  # one context
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens[:-1]]))[0][0].log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    expected = expected[len(prompt_ids) - 1 :]
    assert record["logprobs"][: len(expected)] == pytest.approx(expected, abs=1e-4)
    last_line = text_of(run_sample(*options)[1]).rstrip().splitlines()[-1]
    assert float(last_line.split("\t")[1]) == pytest.approx(record["logprobs"][-1], abs=1e-4)


def test_a_score_is_in_nats_and_bits(run_sample, out_dir, model, tokenizer, tmp_path):
    text = "Zoë saw a dog."
    (tmp_path / "text.txt").write_bytes(text.encode())
    options = (f"--out_dir={out_dir}", f"--score={tmp_path}/text.txt")
    status, output, _ = run_sample(*options, "--format=jsonl")
    (record,) = records(output)
    ids = torch.tensor([tokenizer.encode(text, bos=True)])
    assert ids.shape[1] <= 32 and status == 0
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:])[1].item()
    count, size = ids.shape[1] - 1, len(text.encode())
    assert (record["tokens"], record["bytes"]) == (count, size)
    assert record["loss"] == pytest.approx(loss, abs=1e-4)
    assert record["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert record["bits_per_byte"] == pytest.approx(loss * count / math.log(2) / size, rel=1e-3)
    lines = text_of(run_sample(*options, "--logprobs=True")[1]).splitlines()
    assert f"loss {record['loss']:.4f}" in lines[0] and len(lines) == 1 + count


def test_a_model_with_nan_logits_is_refused(model, tokenizer_path, run_sample, tmp_path):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.norm.weight.fill_(3e38)  # its products overflow
    llama2c.write(from_model(broken), str(tmp_path / "model.bin"))
    (tmp_path / "a.txt").write_text("Once upon a time")
    options = (f"--init_from={tmp_path}/model.bin", f"--tokenizer={tokenizer_path}")
    for option in ("--start=", "--start=Once", "--num_beams=2", f"--score={tmp_path}/a.txt"):
        status, output, error = run_sample(*options, "--format=jsonl", option)
        assert status == 1 and output == "" and "logits are not numbers" in error


# Models and tokenizers


def test_a_checkpoint_and_its_export_give_the_same_sample(run_sample, out_dir):
    first, second = (
        run_sample(f"--init_from={out_dir}/{name}", "--start=Once")[1]
        for name in ("ckpt.pt", "model.bin")
    )
    assert text_of(first) == text_of(second)


@pytest.fixture
def other_tokenizer(stories, tmp_path):
    """other_tokenizer(size) is the path of one that the model was not trained with."""

    def train(size: int) -> str:
        path = str(tmp_path / f"other{size}.model")
        texts = ["zebras quack"] + [text.upper() for text in stories]
        write_atomically(path, train_sentencepiece(texts, size))
        return path

    return train


def test_a_tokenizer_of_another_size_is_refused(run_sample, out_dir, other_tokenizer):
    """llama2.c #263: the wrong tokenizer gives gibberish."""
    path = other_tokenizer(300)
    for name in ("ckpt.pt", "model.bin"):
        status, _, error = run_sample(f"--init_from={out_dir}/{name}", f"--tokenizer={path}")
        assert status == 1 and len(error.splitlines()) == 1
        assert f"{path} has 300 tokens, but the model in {out_dir}/{name} has 512" in error


def test_another_tokenizer_of_the_same_size_is_refused(
    run_sample, out_dir, other_tokenizer, tokenizer
):
    path = other_tokenizer(512)
    status, _, error = run_sample(f"--out_dir={out_dir}", f"--tokenizer={path}")
    assert status == 1 and len(error.splitlines()) == 1
    for part in (path, load_tokenizer(path).hash[:12], f"{out_dir}/ckpt.pt", tokenizer.hash[:12]):
        assert part in error


def test_tokenizer_bin_serves_as_tokenizer_model(run_sample, out_dir, tokenizer, tmp_path):
    write_atomically(str(tmp_path / "vocabulary"), tokenizer.to_bin())
    options = (f"--out_dir={out_dir}", "--start=Once upon")
    default = run_sample(*options)
    from_bin = run_sample(*options, f"--tokenizer={tmp_path}/vocabulary")
    assert default[0] == from_bin[0] == 0
    assert text_of(default[1]) == text_of(from_bin[1])


def test_a_model_without_a_tokenizer_needs_the_option(run_sample, model, tmp_path):
    llama2c.write(from_model(model), str(tmp_path / "model.bin"))
    status, _, error = run_sample(f"--init_from={tmp_path}/model.bin")
    assert status == 1 and len(error.splitlines()) == 1
    assert f"no tokenizer is beside {tmp_path}/model.bin" in error
    assert "--tokenizer=PATH" in error


# Mistakes

MISSING_FILES = [  # options and the message, with status 1
    ("--out_dir={empty}", "{empty}/ckpt.pt: there is no such file"),
    ("--init_from={empty}", "{empty}: a folder without config.json"),
    ("--init_from={out_dir}/tokenizer.model", "{out_dir}/tokenizer.model: "),
    ("--out_dir={out_dir} --tokenizer={empty}/t.model", "{empty}/t.model: No such file"),
    ("--out_dir={out_dir} --tokenizer={out_dir}/model.bin", "{out_dir}/model.bin: neither"),
    ("--out_dir={out_dir} --start=FILE:{empty}/start.txt", "{empty}/start.txt: No such file"),
    ("--out_dir={out_dir} --start=FILE:{out_dir}/ckpt.pt", "ckpt.pt: not UTF-8 text"),
    ("--out_dir={out_dir} --device=gpu", "--device=gpu: must be"),
    ("--out_dir={out_dir} --score={empty}/none.txt", "{empty}/none.txt: No such file"),
    ("--out_dir={out_dir} --score={out_dir}/ckpt.pt", "ckpt.pt: not UTF-8 text"),
    ("--out_dir={out_dir} --score=/dev/null", "--score=/dev/null: there is no text in it"),
]

INVALID_OPTIONS = [  # options and the message, with status 2
    ("--num_samples=0", "--num_samples=0: must be at least 1"),
    ("--batch_size=0", "--batch_size=0: must be at least 1"),
    ("--max_new_tokens=0 --min_new_tokens=0", "--max_new_tokens=0: must be at least 1"),
    ("--min_new_tokens=9 --max_new_tokens=8", "--min_new_tokens=9: must be from 0 to max_new_tok"),
    ("--num_beams=2 --num_samples=3", "--num_samples=3: must be at most --num_beams=2"),
    ("--num_beams=2 --repetition_penalty=2", "--num_beams does not work with --repetition_penalty"),
    ("--interactive=True --format=jsonl", "--interactive generates one text in the terminal"),
    ("--length_penalty=1000", "--length_penalty=1000: must be at least -10 and at most 10"),
    ("--compile=True --num_beams=2", "--compile is for sampling"),
    ("--quantize=int8 --dtype=bfloat16", "--quantize=int8 and --dtype both set the dtype"),
    ("--format=events --logprobs=True", "--format=events does not work with"),
    ("--temperature=-1", "--temperature=-1: must be at least 0 and at most 10000"),
    ("--temperature=nan", "--temperature=nan: must be a number"),
    ("--top_k=-1", "--top_k=-1: must be 0 or more"),
    ("--top_p=0", "--top_p=0: must be above 0 and at most 1"),
    ("--top_p=1.5", "--top_p=1.5: must be above 0 and at most 1"),
    ("--min_p=-0.1", "--min_p=-0.1: must be at least 0 and at most 1"),
    ("--repetition_penalty=0", "--repetition_penalty=0: must be at least 0.01"),
    ("--repetition_penalty=1e-40", "--repetition_penalty=1e-40: must be at least 0.01"),
    ("--stop_ids=</s>", "--stop_ids=</s>: must be a whole number"),
    ("--stop_ids=2,32000", "--stop_ids=2,32000: must be a whole number"),
    ("--stop_ids=-1", "--stop_ids=-1: must be the id of a token, 0 or more"),
    ("--bad_words=\udcff", "not UTF-8 text"),
    ("--stop=\udcff", "not UTF-8 text"),
    ("--score=a.txt --start=a", "--score generates no text: leave out --start"),
    ("--format=xml", "--format=xml: must be"),
    ("--temprature=1", "did you mean temperature?"),
]


@pytest.mark.parametrize("options, message", MISSING_FILES)
def test_a_missing_or_wrong_file_is_refused(options, message, run_sample, out_dir, tmp_path):
    paths = dict(empty=tmp_path, out_dir=out_dir)
    status, _, error = run_sample(*options.format(**paths).split())
    assert status == 1
    assert message.format(**paths) in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("options, message", INVALID_OPTIONS)
def test_an_invalid_option_is_refused_in_one_sentence(options, message, run_sample):
    status, _, error = run_sample(*options.split())
    assert status == 2
    assert message in error and len(error.splitlines()) == 1


def test_texts_of_the_command_line_have_the_same_escapes():
    r"""Only --stop knew \n, and neither had an escape for its separator."""
    config, _ = configure(SampleConfig, [r"--stop=a\nb", r"--stop=\t|\\n", r"--bad_words=\\"])
    assert config.sampling_options["stop"] == ["a\nb", "\t|\\n"]
    assert config.sampling_options["bad_words"] == ["\\"]
    assert read_prompts(r"Tom\n\tsaw\\n \x") == ["Tom\n\tsaw\\n \\x"]


def test_a_stop_string_may_contain_a_bar(run_sample, out_dir):
    """<|im_end|> was split at |, and the text ended at the first <."""
    options = (f"--out_dir={out_dir}", "--start=Once", "--format=jsonl", "--min_new_tokens=40")
    whole = records(run_sample(*options)[1])[0]
    assert len(whole["text"]) > 4
    assert records(run_sample(*options, f"--stop=zz|{whole['text'][2:4]}")[1]) == [whole]


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_an_empty_string_in_a_config_file_is_refused(tmp_path, capsys, name):
    """The message named the option without its dashes."""
    (tmp_path / "config.py").write_text(f"{name} = ['a', '']")
    with pytest.raises(SystemExit):
        configure(SampleConfig, [str(tmp_path / "config.py")], program="sample.py")
    assert capsys.readouterr().err == (
        f"sample.py: --{name}: an empty string in the list; leave it out\n"
    )
