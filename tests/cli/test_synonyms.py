"""What other tools call things, misspelt names and bare paths: each gets an answer, and the command that was meant."""

from __future__ import annotations

import json
import shlex

import pytest

from lora_merge.cli import exits
from lora_merge.cli import main as app
from lora_merge.cli.advice import plain
from lora_merge.cli.arguments import names_of
from lora_merge.cli.synonyms import OPTIONS, SYNONYMS, VERB_SYNONYMS, VERBS

# Names in the issue trackers and documentation of other tools, whatever the table may lose.
ASKED_FOR = [
    "--model",
    "--base-model",
    "--base_model",
    "--model_name_or_path",
    "--model-path",
    "--lora",
    "--lora-path",
    "--lora_path",
    "--adapter_name_or_path",
    "--adapters",
    "--adapter-path",
    "--peft-model",
    "--ckpt_dir",
    "--output",
    "--output-dir",
    "--output_dir",
    "--export_dir",
    "--save-path",
    "--out_path",
    "--torch-dtype",
    "--torch_dtype",
    "--gpu",
    "--cuda",
    "--use-gpu",
    "--force",
    "--base_revision",
    "--push",
    "--trust-remote-code",
    "--trust_remote_code",
    "--no-progress",
    "--safe-serialization",
    "--safe_serialization",
    "--shard-size",
    "--cache-dir",
    "--cache_dir",
    "--weights",
    "--scale",
    "--alpha",
    "--export_size",
    "--device_map",
    "--load_in_4bit",
    "--dequantize",
    "--hub_model_id",
    "--use_auth_token",
    "--low_cpu_mem_usage",
    "--bf16",
    "--fp16",
    "--lora_model_dir",
    "--peft_model_id",
    "--save_safetensors",
    "--template",
    "--finetuning_type",
]
NAMES = sorted({*OPTIONS, *ASKED_FOR})


def hints(result):
    return [line.removeprefix("hint: ") for line in result.stderr.splitlines() if line.startswith("hint: ")]


def parsed(hint):
    """Return the command of a hint and its parameters, parsed by click; fails if it has an unknown option."""
    program, *arguments = shlex.split(hint)
    assert program == "lora-merge"
    name = arguments.pop(0) if arguments[0] in app.commands else "merge"
    command = app.commands[name]
    return name, command.make_context(name, arguments).params


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """A directory of its own for each command, in which nothing may be left."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def value_of(name):
    """Return a value as the other tool's option takes it."""
    row = OPTIONS[plain(name)]
    if row.n_values == 0:
        return []
    special = {
        "--dtype": "float16",
        "--max-shard-size": "5GB",
        "--memory-limit": "2GB",
        "--workers": "2",
        "--seed": "1",
    }
    special |= {
        "--quantize": "int8",
        "--combine": "ties",
        "--config": __file__,
        "--device": "cpu",
        "--rank": "8",
    }
    return [special.get(row.option, "0.5" if row.mark == ":" else "x")]


@pytest.mark.parametrize("name", NAMES)
def test_what_another_tool_calls_an_option_is_answered_with_the_command_that_was_meant(name, cli, empty):
    row = OPTIONS[plain(name)]
    verb = "convert" if row.option == "--rank" else "merge"
    required = ["a", "-o", "o"] if verb == "convert" else ["--adapter", "a", "-o", "o"]

    result = cli(verb, *required, name, *value_of(name))

    assert result.exit_code == exits.USAGE
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if row.option:
        called = "written" if " " in row.option else "called"
        assert error == f"error: `{name}` is {called} `{row.option}` here"
    else:
        assert error == f"error: there is no `{name}`: {row.why}"
    (hint,) = hints(result)
    assert parsed(hint.replace("HF_TOKEN=… ", ""))[0] == verb
    assert name not in shlex.split(hint)
    assert not list(empty.iterdir())


def test_every_name_is_in_one_row_and_is_no_option_of_a_merge():
    names = [name for row in SYNONYMS for name in row.names.split()]

    assert len(names) == len(set(names))
    assert not set(names) & set(names_of(app.commands["merge"]))
    assert all(plain(name) == name for name in names)


def test_every_row_says_an_option_or_a_reason():
    known = {name for command in app.commands.values() for name in names_of(command)}
    for row in SYNONYMS:
        assert bool(row.option) != bool(row.why), row
        assert not row.option or row.option.split()[0] in known, row
        assert not row.why.endswith("."), row


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("--model B --lora A --output-dir O", "--base B --adapter A --out O"),
        ("--base_model=B --lora_path=A --out O", "--base B --adapter A --out O"),
        ("--adapter_name_or_path A,C --export_dir O", "--adapter A --adapter C --out O"),
        ("--adapters A C --out O", "--adapter A --adapter C --out O"),
        ("--adapter A -o O --torch_dtype torch.bfloat16", "--adapter A -o O --dtype bfloat16"),
        ("--adapter A -o O --torch-dtype auto", "--adapter A -o O"),
        ("--adapter A -o O --gpu", "--adapter A -o O --device cuda"),
        ("--adapter A -o O --gpu 1", "--adapter A -o O --device cuda:1"),
        ("--gpu --adapter A -o O", "--device cuda --adapter A -o O"),
        ("--adapter A -o O --device_map auto", "--adapter A -o O --device auto"),
        ("--adapter A -o O --export_size 5", "--adapter A -o O --max-shard-size 5GB"),
        ("--adapter A -o O --merge_lora true", "--adapter A -o O"),
        ("--adapter A -o O --overwrite_output_dir false", "--adapter A -o O"),
        ("--adapter A -o O --force", "--adapter A -o O --overwrite"),
        ("--adapter A -o O --load_in_4bit", "--adapter A -o O"),
        ("--adapter A -o O --bits 4", "--adapter A -o O --quantize int4"),
        ("--adapter A -o O --weights 0.5", "--adapter A:0.5 -o O"),
        ("--adapter A --adapter C -o O --weights 0.5 -0.25", "--adapter A:0.5 --adapter C:-0.25 -o O"),
        ("--lora A --lora_scale 0.5 -o O", "--adapter A:0.5 -o O"),
        ("--base org/b --model-revision v1 --adapter A -o O", "--base org/b@v1 --adapter A -o O"),
        ("--adapter A --hub_model_id me/m", "--adapter A --push-to-hub me/m"),
        ("--adapter A --push_to_hub me/m", "--adapter A --push-to-hub me/m"),
        ("--adapter org/a --subfolder ckpt -o O", "--adapter org/a/ckpt -o O"),
        ("--dry_run --adapter A -o O", "--dry-run --adapter A -o O"),
        ("-base B --adapter A -o O", "--base B --adapter A -o O"),
        ("--Base B --adapter A -o O", "--base B --adapter A -o O"),
        ("--adaptor A -o O", "--adapter A -o O"),
        ("--adapter A -o O --ovewrite", "--adapter A -o O --overwrite"),
        ("--adapter A --outptu-dir O", "--adapter A --out O"),
        ("--model 'my base' --adapter A -o O", "--base 'my base' --adapter A -o O"),
        ("plan --model B --lora A", "plan --base B --adapter A"),
        ("plan --base B --adapter A -o O --overwrite", "plan --base B --adapter A"),
        ("--quiet verify O", "verify --quiet O"),
        ("--json merge --adapter A -o O", "merge --json --adapter A -o O"),
        ("inspect --adapter A", "inspect A"),
        ("inspect --lora A --model B", "inspect A --base B"),
        ("verify --output-dir O", "verify O"),
        ("convert A --output O --lora-rank 8", "convert A --out O --rank 8"),
        ("export --model B --lora A --export_dir O", "merge --base B --adapter A --out O"),
        ("fuse --model B --adapter-path A --save-path O", "merge --base B --adapter A --out O"),
        ("mrege --adapter A -o O", "merge --adapter A -o O"),
        ("Merge --adapter A -o O", "merge --adapter A -o O"),
        ("mergge --model B --lora A -o O", "merge --base B --adapter A -o O"),
        ("inspct A", "inspect A"),
        ("check O", "verify O"),
        ("quantize --adapter A -o O", "merge --adapter A -o O --quantize fp8"),
        ("B A O", "--base B --adapter A -o O"),
        ("merge B A O", "merge --base B --adapter A -o O"),
        ("org/b org/a O", "--base org/b --adapter org/a -o O"),
        ("--base B A", "--base B --adapter A -o merged"),
        ("--base B -o O ./A", "--base B -o O --adapter ./A"),
        ("--adapter A", "--adapter A -o merged"),
        ("--adapter A -o O --explain q_proj", "plan --adapter A --explain q_proj"),
        ("--base B -o O", "--base B -o O --adapter ADAPTER"),
        ("help verify", "verify --help"),
        ("help", "--help"),
        ("version", "--version"),
    ],
)
def test_the_hint_is_the_whole_command_that_was_meant(line, meant, cli):
    result = cli(*shlex.split(line))

    assert result.exit_code == exits.USAGE
    assert hints(result) == [f"lora-merge {meant}"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--zzz", "no option `--zzz`"),
        ("--adapter A -o O --rank 8", "`--rank` is an option of `convert` or `extract`, not of `merge`"),
        ("--adaptor A -o O", "no option `--adaptor`; did you mean `--adapter`?"),
        ("--dry_run", "`--dry_run` is written `--dry-run`"),
        ("--bogus", "no option `--bogus`"),
        ("--test", "no option `--test`"),
        ("--cudaa", "no option `--cudaa`; did you mean `--device cuda`?"),
        ("inspect A B", "unexpected argument `B`"),
        ("plan --adapter A --out O", "`plan` writes nothing and has no `--out`"),
        ("-q verify O", "the command comes first: lora-merge verify …"),
        ("inspect --adapter A", "`--adapter` is the argument ADAPTER of `inspect`, without a name"),
        ("mrege", "no command `mrege`; did you mean `merge`?"),
        ("export", "`export` is called `merge` here"),
        ("serve", "no command `serve`: an engine runs the merged checkpoint: vllm serve OUT"),
        ("xyzzy", f"no command `xyzzy`, expected {', '.join(app.commands)}"),
        (
            "--adapter A",
            "missing option `--out`: directory to create, or a URL; a --config file can give it, too",
        ),
        ("convert A", "missing option `--out`: directory to create"),
    ],
)
def test_the_error_is_one_sentence(line, sentence, cli):
    result = cli(*shlex.split(line))

    assert result.exit_code == exits.USAGE
    assert result.stderr.splitlines()[0] == f"error: {sentence}"
    assert hints(result)


def test_several_options_have_a_line_each(cli):
    result = cli("export", "--model", "B", "--lora_path", "A", "--out", "O", "--trust_remote_code")
    without_verb = cli("--model", "B", "--lora_path", "A", "--out", "O", "--trust_remote_code")

    lines = [
        "  `--model` is called `--base` here",
        "  `--lora_path` is called `--adapter` here",
        "  there is no `--trust_remote_code`: lora-merge never runs code from a checkpoint, so leave it out",
    ]
    meant = "--base B --adapter A --out O"
    assert result.stderr.splitlines() == [
        "error: `export` is called `merge` here",
        *lines,
        f"hint: lora-merge merge {meant}",
    ]
    assert without_verb.stderr.splitlines() == [
        "error: 3 options are not known here",
        *lines,
        f"hint: lora-merge {meant}",
    ]


def test_one_option_that_cannot_be_guessed_is_named_beside_the_others(cli):
    result = cli("--model", "B", "--zzz", "--adapter", "A")

    assert result.stderr.splitlines() == [
        "error: 2 options are not known here",
        "  `--model` is called `--base` here",
        "  no option `--zzz`",
        "hint: lora-merge --help lists the options",
    ]


@pytest.mark.parametrize("word", sorted(VERBS))
def test_every_command_of_another_tool_is_answered(word, cli):
    row = VERBS[word]
    result = cli(word, "--adapter", "A", "-o", "O")

    assert result.exit_code == exits.USAGE
    assert f"`{word}`" in result.stderr
    if row.verb:
        assert shlex.split(hints(result)[0])[1] == row.verb
    else:
        assert row.why in result.stderr


def test_every_command_of_another_tool_means_a_command_or_says_why():
    for row in VERB_SYNONYMS:
        assert row.verb or row.why
        assert not row.verb or row.verb in app.commands
    assert not set(VERBS) & set(app.commands)


def test_bare_paths_are_told_apart_by_what_is_in_them(pico, pico_adapter, cli):
    base, adapter = pico(), pico_adapter(pico())

    result = cli(adapter, base, "merged")

    assert result.exit_code == exits.USAGE
    assert hints(result) == [f"lora-merge --base {base} --adapter {adapter} -o merged"]
    assert f"`{adapter}` looks like an adapter" in result.stderr
    assert f"`{base}` looks like a base model" in result.stderr


def test_a_file_of_an_adapter_means_its_folder(pico, pico_adapter, cli):
    adapter = pico_adapter(pico())

    result = cli("--base", "b", adapter / "adapter_model.safetensors", "-o", "out")

    assert hints(result) == [f"lora-merge --base b -o out --adapter {adapter}"]


def test_one_path_alone_is_answered_by_what_it_is(pico, pico_adapter, cli, empty):
    base, adapter = pico(), pico_adapter(pico())
    (empty / "jobs.yaml").write_text("jobs:\n- {adapter: a, out: o}\n")
    (empty / "merge.yaml").write_text("adapter: a\nout: o\n")
    assert cli("--base", base, "--adapter", adapter, "-o", "made").exit_code == 0

    assert hints(cli(adapter)) == [
        f"lora-merge --adapter {adapter} -o merged  (to merge it)",
        f"lora-merge inspect {adapter}  (to look at it)",
    ]
    assert hints(cli(base)) == [f"lora-merge --base {base} --adapter ADAPTER -o merged"]
    assert hints(cli("./made")) == ["lora-merge verify ./made"]
    assert hints(cli("jobs.yaml")) == ["lora-merge batch jobs.yaml"]
    assert hints(cli("merge.yaml")) == ["lora-merge --config merge.yaml"]


def test_a_hint_does_not_repeat_a_token(cli):
    result = cli("--adapter", "a", "--token", "not-to-be-shown", "--force")

    assert "not-to-be-shown" not in result.output + result.stderr
    assert hints(result) == ["HF_TOKEN=… lora-merge --adapter a --overwrite"]


def test_a_hint_is_quoted_for_a_shell_and_cannot_control_a_terminal(cli):
    result = cli("--model", "a b; rm -rf $HOME", "--lora", "\x1b[2J")

    assert "\x1b" not in result.stderr
    assert "'a b; rm -rf $HOME'" in hints(result)[0]


def test_the_answer_is_data_with_json(cli):
    result = cli("--model", "b", "--adapter", "a", "-o", "o", "--json")
    document = json.loads(result.stdout)

    assert document["message"] == "`--model` is called `--base` here"
    assert document["hint"] == "lora-merge --base b --adapter a -o o --json"
    assert document["exit_code"] == exits.USAGE


def test_the_option_of_a_command_wins_over_the_table(cli):
    """``verify`` has ``--trust-remote-code``."""
    result = cli("verify", "missing", "--trust-remote-code")

    assert "there is no `--trust-remote-code`" not in result.stderr
