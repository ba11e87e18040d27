import copy
import functools
import json
import math

import pytest
import torch

from checkpoints.file import save_checkpoint, write_model_args
from formats import llama2c
from formats.lazy_model import from_model
from generation.beam_search import beam_search
from generation.engine import continuation
from generation.streaming import Story, generate
from model import ModelArgs, Transformer
from runtime.atomic_files import write_atomically
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
    """run_sample("--seed=1", ...) runs the script in this process: (status, standard output, standard error)."""
    return functools.partial(run_script, "sample.py", "--device=cpu", "--max_new_tokens=40")


def text_of(output: str) -> str:
    """What was printed beside the list of options."""
    return "\n".join(line for line in output.split("\n") if not line.endswith("  (command line)"))


def test_the_command_prints_the_prompt_and_what_goes_on_from_it(
    run_script, out_dir, model, tokenizer
):
    arguments = (
        f"--out_dir={out_dir}",
        "--start=Zoë saw",
        "--temperature=0",
        "--max_new_tokens=60",
        "--device=cpu",
    )
    result = run_script(
        "sample.py", *arguments, env={"PYTHONUTF8": "1", "PYTHONPROFILEIMPORTTIME": "1"}
    )
    prompt = tokenizer.encode("Zoë saw", bos=True)
    stop = {tokenizer.bos_id, tokenizer.eos_id}
    tokens = continuation(model, prompt, stop, max_new_tokens=60, temperature=0)
    assert result.returncode == 0, result.stderr
    assert text_of(result.stdout) == tokenizer.decode([*prompt, *tokens]) + "\n"
    assert text_of(result.stdout).startswith("Zoë saw")
    assert "tokens/s on cpu" in result.stderr
    imported = [
        line.split("|")[-1].strip()
        for line in result.stderr.splitlines()
        if line.startswith("import time:")
    ]
    assert "torch" in imported and not {"torch._dynamo", "sympy"} & {
        *imported
    }  # a second that a person would wait


def test_a_character_that_the_terminal_lacks_ends_no_story(run_script, out_dir):
    """As where output goes to a file on Windows, in the code page of the system."""
    arguments = (f"--out_dir={out_dir}", "--start=Zoë saw", "--max_new_tokens=5", "--device=cpu")
    result = run_script("sample.py", *arguments, env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert text_of(result.stdout).startswith("Zo")


def test_the_same_seed_tells_the_same_stories_and_another_seed_others(run_sample, out_dir):
    told = [
        run_sample(f"--out_dir={out_dir}", "--start=Once", f"--seed={seed}")[1]
        for seed in (1, 1, 2)
    ]
    first, again, other = map(text_of, told)
    assert first == again != other


def test_other_prompts_have_other_draws(tokenizer):
    stories = [Story(tokenizer, *what) for what in (("Once", 0), ("Tom", 0), ("Once", 1))]
    assert (
        len({story.sample for story in stories}) == 3
        and Story(tokenizer, "Once").sample == stories[0].sample
    )


def test_several_samples_differ_and_each_begins_with_the_prompt(run_sample, out_dir):
    status, output, _ = run_sample(f"--out_dir={out_dir}", "--start=Once", "--num_samples=3")
    samples = text_of(output).split("\n---------------\n")
    assert status == 0 and len(set(samples)) == len(samples) == 3
    assert all(text.startswith("Once") for text in samples)


def test_the_prompt_may_be_in_a_file(run_sample, out_dir, tmp_path):
    (tmp_path / "start.txt").write_text("Zoë had a red ball.\nShe", encoding="utf-8")
    status, output, _ = run_sample(f"--out_dir={out_dir}", f"--start=FILE:{tmp_path}/start.txt")
    assert status == 0
    assert text_of(output).startswith("Zoë had a red ball.\nShe")


def test_prompts_come_from_standard_input_one_in_a_line(run_sample, out_dir):
    arguments = (f"--out_dir={out_dir}", "--format=jsonl", "--num_samples=2")
    status, output, _ = run_sample(*arguments, "--start=-", stdin="Once\nZoë saw\r\n")
    told = records(output)
    assert status == 0 and [record["prompt"] for record in told] == [
        "Once",
        "Once",
        "Zoë saw",
        "Zoë saw",
    ]
    assert told[:2] == records(run_sample(*arguments, "--start=Once")[1])
    assert told[2:] == records(
        run_sample(*arguments, "--start=Zoë saw")[1]
    )  # the seed says the same anywhere


def test_standard_input_must_hold_text(run_sample, out_dir):
    for content, said in (
        (b"", "standard input is empty"),
        (b"\xff\xfe", "standard input: not UTF-8"),
    ):
        status, _, error = run_sample(f"--out_dir={out_dir}", "--start=-", stdin=content)
        assert status == 1 and said in error and len(error.splitlines()) == 1


def test_only_a_new_line_ends_a_prompt(run_sample, out_dir):
    options = (f"--out_dir={out_dir}", "--start=-", "--format=jsonl")
    told = records(run_sample(*options, stdin="a\u2028b\x0cc\n\nd")[1])
    assert [record["prompt"] for record in told] == ["a\u2028b\x0cc", "", "d"]


def test_closed_standard_streams_are_told_in_one_sentence(run_sample, out_dir):
    status, _, error = run_sample(f"--out_dir={out_dir}", "--start=-", stdin=None)
    assert status == 1 and "standard input is empty" in error and len(error.splitlines()) == 1


def records(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def test_jsonl_is_a_record_a_sample_and_nothing_else(run_sample, out_dir, tokenizer):
    arguments = (f"--out_dir={out_dir}", "--start=Once", "--num_samples=3")
    status, output, _ = run_sample(*arguments, "--format=jsonl")
    found = records(output)
    told = text_of(run_sample(*arguments)[1]).removesuffix("\n").split("\n---------------\n")
    assert status == 0 and [record["prompt"] + record["text"] for record in found] == told
    for record in found:
        assert (
            tokenizer.decode([*tokenizer.encode("Once", bos=True), *record["tokens"]])
            == "Once" + record["text"]
        )
        assert record["finish"] == ("length" if len(record["tokens"]) == 40 else "stop")


def test_stories_do_not_depend_on_how_many_are_told_at_once(run_sample, out_dir):
    """--format=events tells of all in turn; put together, its pieces are the stories of jsonl."""
    told = []
    for options in (["jsonl", 1], ["jsonl", 4], ["events", 4]):
        arguments = (f"--out_dir={out_dir}", "--start=-", "--num_samples=2", "--stop=a|e")
        arguments += (f"--format={options[0]}", f"--batch_size={options[1]}")
        result = run_sample(*arguments, stdin="Once\nZoë saw a dog and a cat\n\n")
        told.append(records(result.stdout))
    assert told[0] == told[1] and len(told[0]) == 6
    texts, order = {}, []
    for piece in told[2]:
        order.append((piece["prompt"], piece["sample"]))
        texts[order[-1]] = texts.get(order[-1], "") + piece["text"]
    assert [texts[key] for key in sorted(texts)] == [record["text"] for record in told[0]]
    assert order != sorted(order)


def test_beams_print_the_likeliest_texts_with_their_scores(run_sample, out_dir, model, tokenizer):
    arguments = (
        f"--out_dir={out_dir}",
        "--start=Once",
        "--num_beams=4",
        "--num_samples=3",
        "--max_new_tokens=9",
    )
    status, output, _ = run_sample(
        *arguments, "--format=jsonl", "--logprobs=True", "--length_penalty=0"
    )
    found = records(output)
    expected = beam_search(
        model, tokenizer.encode("Once", bos=True), 4, 9, 0.0, tokenizer.stop_ids, 3
    )
    assert status == 0 and [record["tokens"] for record in found] == [
        one.tokens for one in expected
    ]
    scores = sorted((one.score for one in expected), reverse=True)
    assert [record["score"] for record in found] == pytest.approx(
        scores, rel=1e-5
    )  # packed matrices sum otherwise
    for record in found:
        if record["finish"] == "length":
            assert sum(record["logprobs"]) == pytest.approx(record["score"], abs=1e-3)
    text = (
        text_of(run_sample(*arguments, "--length_penalty=0")[1])
        .removesuffix("\n")
        .split("\n---------------\n")
    )
    assert text == ["Once" + record["text"] for record in found]


def test_beams_end_at_a_stop_string_with_their_tokens(run_sample, out_dir, tokenizer):
    arguments = (f"--out_dir={out_dir}", "--start=Once", "--num_beams=3", "--format=jsonl")
    whole = records(run_sample(*arguments)[1])[0]
    stop = whole["text"][8:11]
    (found,) = records(run_sample(*arguments, f"--stop={stop}")[1])
    assert found["text"] == whole["text"][: whole["text"].find(stop)] and found["finish"] == "stop"
    assert found["tokens"] == whole["tokens"][: len(found["tokens"])] and len(
        found["tokens"]
    ) < len(whole["tokens"])
    assert stop in tokenizer.decode([*tokenizer.encode("Once", bos=True), *found["tokens"]])


@pytest.mark.parametrize(
    "options", [["--quantize=int8"], ["--compile=True"], ["--batch_size=1"]], ids=str
)
def test_what_makes_it_fast_tells_stories_too(options, run_sample, out_dir):
    arguments = (f"--out_dir={out_dir}", "--start=Once", "--max_new_tokens=20", "--format=jsonl")
    plain, fast = (records(run_sample(*arguments, *more)[1])[0] for more in ([], options))
    assert plain["prompt"] == fast["prompt"] and len(fast["tokens"]) > 5
    assert options == ["--quantize=int8"] or plain == fast


def test_what_a_stop_string_cut_off_is_no_part_of_a_story_in_turns(run_sample, out_dir):
    arguments = (f"--out_dir={out_dir}", "--temperature=0", "--max_new_tokens=12")
    arguments += ("--interactive=True",)
    result = run_sample(*arguments, stdin="Once\n\n")
    first, _ = text_of(result.stdout).removesuffix("\n").split("\n")
    stop = first[-3:]
    result = run_sample(*arguments, f"--stop={stop}", stdin="Once\nthere\n")
    shown, _ = text_of(result.stdout).split("\n", 1)
    assert shown == first[: first.find(stop, len("Once"))]


def test_a_model_that_has_come_to_nothing_is_said_to(
    model, tokenizer, tokenizer_path, run_sample, tmp_path
):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.norm.weight.fill_(3e38)  # its products overflow
    llama2c.write(from_model(broken), str(tmp_path / "model.bin"))
    (tmp_path / "a.txt").write_text("Once upon a time")
    for more in (["--start=Once"], ["--num_beams=2"], [f"--score={tmp_path}/a.txt"]):
        arguments = (
            f"--init_from={tmp_path}/model.bin",
            f"--tokenizer={tokenizer_path}",
            "--format=jsonl",
        )
        status, output, error = run_sample(*arguments, *more)
        assert status == 1 and output == "" and "logits are not numbers" in error


@pytest.mark.parametrize(
    "wrong",
    [
        dict(prompts="Once"),
        dict(stop="the"),
        dict(bad_words=[""]),
        dict(num_samples=0),
        dict(temperature=-1),
    ],
)
def test_impossible_arguments_of_the_library_are_refused(wrong, model, tokenizer):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        next(generate(model, tokenizer, **dict(prompts=["Once"]) | wrong))


def test_a_story_in_turns_goes_on_as_one_with_the_same_beginning(run_sample, out_dir):
    arguments = (f"--out_dir={out_dir}", "--temperature=0", "--max_new_tokens=8")
    typed = "Zoë saw\n\na dog\n"
    status, output, error = run_sample(*arguments, "--interactive=True", stdin=typed)
    first, second, third = text_of(output).removesuffix("\n").split("\n")
    assert status == 0 and "24 tokens" in error
    assert first == text_of(run_sample(*arguments, "--start=Zoë saw")[1]).strip("\n")
    longer = text_of(
        run_sample(*arguments[:-1], "--start=Zoë saw", "--max_new_tokens=16")[1]
    ).strip("\n")
    assert first + second == longer and third.startswith(" a dog")


def test_a_stop_string_ends_a_story_and_is_not_shown(run_sample, out_dir):
    arguments = (f"--out_dir={out_dir}", "--start=Once", "--temperature=0", "--format=jsonl")
    whole = records(run_sample(*arguments)[1])[0]["text"]
    stop = whole[9:13]
    found = records(run_sample(*arguments, f"--stop=zzz|{stop}")[1])[0]
    assert found["text"] == whole[: whole.find(stop)] and found["finish"] == "stop"
    assert len(found["tokens"]) < 40
    assert stop not in text_of(
        run_sample(*arguments, "--format=text", f"--stop={stop}")[1]
    ).removeprefix("Once")


def test_bad_words_appear_in_no_story(run_sample, out_dir):
    arguments = (
        f"--out_dir={out_dir}",
        "--start=Once",
        "--format=jsonl",
        "--num_samples=5",
        "--top_k=0",
    )
    free = "".join(record["text"] for record in records(run_sample(*arguments)[1]))
    words = [free[place : place + 2] for place in range(0, len(free) - 1, 5)]
    words = [
        word for word in words if "|" not in word and "\\" not in word and "\ufffd" not in word
    ][:5]
    told = [
        record["text"]
        for record in records(run_sample(*arguments, f"--bad_words={'|'.join(words)}")[1])
    ]
    assert words and len(told) == 5
    assert not [word for word in words if any(word in text for text in told)]


def test_log_probabilities_of_a_story_are_the_score_of_its_text(
    run_sample, out_dir, model, tokenizer
):
    arguments = (
        f"--out_dir={out_dir}",
        "--start=Once",
        "--format=jsonl",
        "--logprobs=True",
        "--max_new_tokens=60",
    )
    found = records(run_sample(*arguments)[1])[0]
    tokens = [*tokenizer.encode("Once", bos=True), *found["tokens"]][
        :32
    ]  # what the model sees at once
    with torch.no_grad():
        likely = model(torch.tensor([tokens[:-1]]))[0][0].log_softmax(-1)
    expected = likely.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    offset = len(tokenizer.encode("Once", bos=True)) - 1
    assert found["logprobs"][: len(expected) - offset] == pytest.approx(expected[offset:], abs=1e-4)
    text = text_of(run_sample(*arguments, "--format=text")[1])
    last_line = text.rstrip().splitlines()[-1]
    assert float(last_line.split("\t")[1]) == pytest.approx(found["logprobs"][-1], abs=1e-4)


def test_a_text_is_scored_in_nats_and_bits(run_sample, out_dir, model, tokenizer, tmp_path):
    text = "Zoë saw a dog."
    (tmp_path / "text.txt").write_bytes(text.encode())
    arguments = (f"--out_dir={out_dir}", f"--score={tmp_path}/text.txt")
    status, output, _ = run_sample(*arguments, "--format=jsonl")
    (found,) = records(output)
    ids = torch.tensor([tokenizer.encode(text, bos=True)])
    assert ids.shape[1] <= 32 and status == 0
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:])[1].item()
    count = ids.shape[1] - 1
    assert (found["tokens"], found["bytes"]) == (count, len(text.encode()))
    assert found["loss"] == pytest.approx(loss, abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(
        loss * count / math.log(2) / len(text.encode()), rel=1e-3
    )
    lines = text_of(run_sample(*arguments, "--logprobs=True")[1]).splitlines()
    assert f"loss {found['loss']:.4f}" in lines[0] and len(lines) == 1 + count


def test_a_checkpoint_and_the_exported_file_tell_the_same_story(run_sample, out_dir):
    told = [
        run_sample(f"--init_from={out_dir}/{name}", "--start=Once")[1]
        for name in ("ckpt.pt", "model.bin")
    ]
    assert text_of(told[0]) == text_of(told[1])


def test_bfloat16_tells_a_story(run_sample, out_dir):
    assert run_sample(f"--out_dir={out_dir}", "--dtype=bfloat16", "--start=Once")[0] == 0


@pytest.mark.parametrize("name", ["bos_id", "eos_id"])
def test_a_story_ends_where_the_model_says_so(
    name, run_sample, tokenizer, tokenizer_path, tmp_path
):
    """The likeliest token of this model is always the same."""
    model = Transformer(
        ModelArgs(
            dim=4, n_layers=1, n_heads=1, vocab_size=512, max_seq_len=32, tie_embeddings=False
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.tok_embeddings.weight.fill_(1)
        model.norm.weight.fill_(1)
        model.output.weight[getattr(tokenizer, name)] = 1
    llama2c.write(from_model(model), str(tmp_path / "model.bin"))
    arguments = (
        f"--init_from={tmp_path}/model.bin",
        f"--tokenizer={tokenizer_path}",
        "--temperature=0",
    )
    status, output, error = run_sample(*arguments, "--start=The end")
    assert status == 0 and text_of(output) == "The end\n"
    assert "\n0 tokens" in error


@pytest.fixture
def other_tokenizer(stories, tmp_path):
    """other_tokenizer(size) is the path of one that the model was not trained with."""

    def train(size: int) -> str:
        path = str(tmp_path / f"other{size}.model")
        write_atomically(
            path, train_sentencepiece(["zebras quack"] + [text.upper() for text in stories], size)
        )
        return path

    return train


def test_a_tokenizer_of_another_size_is_refused_with_both_named(
    run_sample, out_dir, other_tokenizer
):
    """llama2.c #263: the wrong tokenizer tells gibberish."""
    path = other_tokenizer(300)
    for name in ("ckpt.pt", "model.bin"):
        status, _, error = run_sample(f"--init_from={out_dir}/{name}", f"--tokenizer={path}")
        assert status == 1 and len(error.splitlines()) == 1
        assert f"{path} has 300 tokens, but the model in {out_dir}/{name} has 512" in error


def test_another_tokenizer_of_the_same_size_is_refused_with_both_named(
    run_sample, out_dir, other_tokenizer, tokenizer
):
    path = other_tokenizer(512)
    status, _, error = run_sample(f"--out_dir={out_dir}", f"--tokenizer={path}")
    assert status == 1 and len(error.splitlines()) == 1
    for part in (path, load_tokenizer(path).hash[:12], f"{out_dir}/ckpt.pt", tokenizer.hash[:12]):
        assert part in error


def test_a_tokenizer_bin_is_as_good_as_the_tokenizer_model(
    run_sample, out_dir, tokenizer, tmp_path
):
    write_atomically(str(tmp_path / "vocabulary"), tokenizer.to_bin())
    told = [
        run_sample(f"--out_dir={out_dir}", "--start=Once upon", *more)
        for more in ([], [f"--tokenizer={tmp_path}/vocabulary"])
    ]
    assert told[0][0] == told[1][0] == 0
    assert text_of(told[0][1]) == text_of(told[1][1])


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (["--out_dir={empty}"], 1, "{empty}/ckpt.pt: there is no such file"),
        (["--init_from={empty}"], 1, "{empty}: a folder without config.json"),
        (["--init_from={out_dir}/tokenizer.model"], 1, "{out_dir}/tokenizer.model: "),
        (
            ["--out_dir={out_dir}", "--tokenizer={empty}/t.model"],
            1,
            "{empty}/t.model: No such file",
        ),
        (
            ["--out_dir={out_dir}", "--tokenizer={out_dir}/model.bin"],
            1,
            "{out_dir}/model.bin: neither",
        ),
        (
            ["--out_dir={out_dir}", "--start=FILE:{empty}/start.txt"],
            1,
            "{empty}/start.txt: No such file",
        ),
        (["--out_dir={out_dir}", "--start=FILE:{out_dir}/ckpt.pt"], 1, "ckpt.pt: not UTF-8 text"),
        (["--out_dir={out_dir}", "--device=gpu"], 1, "--device=gpu: must be"),
        (["--num_samples=0"], 2, "--num_samples=0: must be at least 1"),
        (["--batch_size=0"], 2, "--batch_size=0: must be at least 1"),
        (["--max_new_tokens=0", "--min_new_tokens=0"], 2, "--max_new_tokens=0: must be at least 1"),
        (
            ["--num_beams=2", "--num_samples=3"],
            2,
            "--num_samples=3: a search with --num_beams=2 finds no more",
        ),
        (
            ["--num_beams=2", "--repetition_penalty=2"],
            2,
            "--num_beams goes without --repetition_penalty",
        ),
        (
            ["--interactive=True", "--format=jsonl"],
            2,
            "--interactive is one story, from the terminal, as text",
        ),
        (
            ["--length_penalty=1000"],
            2,
            "--length_penalty=1000: must be at least -10 and at most 10",
        ),
        (["--compile=True", "--num_beams=2"], 2, "--compile is for drawing stories"),
        (
            ["--quantize=int8", "--dtype=bfloat16"],
            2,
            "--quantize=int8 and --dtype are two choices of one thing",
        ),
        (["--format=events", "--logprobs=True"], 2, "--format=events goes without"),
        (["--temperature=-1"], 2, "--temperature=-1: must be 0 or more"),
        (["--temperature=nan"], 2, "--temperature=nan: must be a number"),
        (["--top_k=-1"], 2, "--top_k=-1: must be 0 or more"),
        (["--top_p=0"], 2, "--top_p=0: must be above 0 and at most 1"),
        (["--top_p=1.5"], 2, "--top_p=1.5: must be above 0 and at most 1"),
        (["--min_p=-0.1"], 2, "--min_p=-0.1: must be at least 0 and at most 1"),
        (["--repetition_penalty=0"], 2, "--repetition_penalty=0: must be at least 0.01"),
        (["--repetition_penalty=1e-40"], 2, "--repetition_penalty=1e-40: must be at least 0.01"),
        (["--bad_words=\udcff"], 2, "not UTF-8 text"),
        (["--stop=\udcff"], 2, "not UTF-8 text"),
        (["--score=a.txt", "--start=a"], 2, "--score tells no story: leave out --start"),
        (
            ["--min_new_tokens=9", "--max_new_tokens=8"],
            2,
            "--min_new_tokens=9: must be from 0 to max_new_tokens",
        ),
        (["--stop=a|"], 2, "--stop=a|: there is nothing before or after a |"),
        (["--bad_words=|a"], 2, "--bad_words=|a: there is nothing before or after a |"),
        (["--format=xml"], 2, "--format=xml: must be"),
        (["--out_dir={out_dir}", "--score={empty}/none.txt"], 1, "{empty}/none.txt: No such file"),
        (["--out_dir={out_dir}", "--score={out_dir}/ckpt.pt"], 1, "ckpt.pt: not UTF-8 text"),
        (
            ["--out_dir={out_dir}", "--score=/dev/null"],
            1,
            "--score=/dev/null: there is no text in it",
        ),
        (["--temprature=1"], 2, "did you mean temperature?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_refused_in_one_sentence(
    arguments, status, said, run_sample, out_dir, tmp_path
):
    places = dict(empty=tmp_path, out_dir=out_dir)
    ended, _, error = run_sample(*(argument.format(**places) for argument in arguments))
    assert ended == status
    assert said.format(**places) in error and len(error.splitlines()) == 1


def test_without_a_tokenizer_beside_the_model_one_must_be_named(run_sample, model, tmp_path):
    llama2c.write(from_model(model), str(tmp_path / "model.bin"))
    status, _, error = run_sample(f"--init_from={tmp_path}/model.bin")
    assert status == 1 and len(error.splitlines()) == 1
    assert (
        f"no tokenizer.model beside {tmp_path}/model.bin" in error and "--tokenizer=PATH" in error
    )


def test_the_command_ends_with_status_1_and_one_sentence_where_there_is_no_model(run_script):
    result = run_script("sample.py")
    assert result.returncode == 1
    assert "out/ckpt.pt" in result.stderr and len(result.stderr.splitlines()) == 1
