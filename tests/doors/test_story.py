"""From Meta's files to a chat with a model of one's own: the commands of docs/deltas.md in order, at tiny size."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_door, run_here
from markdown_pages import commands
from meta_files import write, write_checklist
from plain import Sizes, State, native, random_state, write_sentencepiece
from safetensors.torch import load_file

from lit_llama.text.prompts.encode import folder_style, named_style, prompt_ids
from lit_llama.text.tokenizer.base import Tokenizer

META, BASE, DELTA, ZIYA = "LLaMA/13B", "checkpoints/llama-13b", "checkpoints/Ziya-LLaMA-13B-v1", "checkpoints/ziya-13b"
DATA, RUN, MERGED = "data/mine", "out/lora/mine", "checkpoints/mine"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SIZES = Sizes(n_kv_heads=4, norm_eps=1e-6)  # LLaMA 1: every head has its own keys
PIECES, ROWS = 400, 416  # of Ziya: two tokens are added to the pieces, the rows after them stand for nothing
HUMAN, BOT, END = 400, 401, 2
ROWS_OF_DATA = [
    {"instruction": "What is the blue lamp?", "input": "", "output": '{"item": "blue lamp", "quantity": 2}'},
    {"instruction": "Where is 北京?", "input": "", "output": "北京 is a city. 😀"},
    {"instruction": "Extract the order.", "input": "Zoë's café", "output": "naïve,\n\n  Zoë"},
    {"instruction": "Who are you?", "input": "", "output": "I say <bot>: and </s> as words"},
    {"instruction": "One word", "input": "", "output": "task"},
]


def half(state: State) -> State:
    """Float16, and norms near 1 as in a model."""
    return {name: (1 + 0.1 * value if value.ndim == 1 else value).half() for name, value in state.items()}


def publish_delta(folder: Path, base: State) -> State:
    """What the publisher of Ziya did: target - base, embedding and head whole, 3 torch files with an index, and the
    tokenizer as sentencepiece's model with two tokens beside it.

    Returns:
        The sum that everybody is to get, added in float16.
    """
    folder.mkdir(parents=True)
    move = native(random_state(SIZES, seed=1), SIZES)
    whole = half(native(random_state(replace(SIZES, vocab=ROWS), seed=2), SIZES))
    target = {name: (value * (1 + 0.01 * move[name])).half() for name, value in base.items()}
    delta = {name: (value.float() - base[name].float()).half() for name, value in target.items()}
    delta |= {name: whole[name] for name in (EMBEDDING, HEAD)}
    delta["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8).half()
    weight_map = {}
    for part in range(3):
        file = f"pytorch_model-{part + 1:05d}-of-00003.bin"
        names = list(delta)[part::3]
        torch.save({name: delta[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in delta.values())}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "use_cache": True}
    config |= {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"rms_norm_eps": 1e-06, "vocab_size": ROWS, "max_position_embeddings": 2048, "torch_dtype": "float16"}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    write_sentencepiece(folder, PIECES)
    (folder / "added_tokens.json").write_text(json.dumps({"<human>": HUMAN, "<bot>": BOT}))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    settings = roles | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"clean_up_tokenization_spaces": False}))
    return {name: delta[name] if name in (EMBEDDING, HEAD) else base[name] + delta[name] for name in base}


class Story:
    """A user's working folder after all commands, what each said, and what the weights are to be."""

    def __init__(self, home: Path) -> None:
        self.home = home
        meta = half(random_state(SIZES))
        self.base = native(meta, SIZES)
        (home / "vocabulary").mkdir()
        write(home / META, meta, SIZES, write_sentencepiece(home / "vocabulary", SIZES.vocab), shards=2)
        write_checklist(home / META)
        self.ziya = publish_delta(home / DELTA, self.base)
        (home / DATA).mkdir(parents=True)
        (home / DATA / "rows.json").write_text(json.dumps(ROWS_OF_DATA * 2, ensure_ascii=False), "utf-8")
        self.said: dict[str, str] = {}
        self.commands: list[tuple[str, ...]] = []
        self.run("prepare/checkpoint.py", "--source", META, "--destination_path", BASE)
        sides = ("--base_dir", BASE, "--delta_dir", DELTA)
        self.run("prepare/delta.py", "apply", *sides, "--destination_path", ZIYA)
        self.run("prepare/delta.py", "verify", "--merged_dir", ZIYA, *sides)
        rows = ("--destination_path", DATA, "--data_file_name", "rows.json", "--test_split_size", 2)
        self.run("prepare/alpaca.py", *rows, "--tokenizer_path", ZIYA, "--prompt_style", "ziya", "--mask_inputs", True)
        train = ("--checkpoint_dir", ZIYA, "--data_dir", DATA, "--out_dir", RUN, "--precision", "32-true")
        course = ("--train.epochs", 60, "--train.learning_rate", 0.01, "--train.batch_size", 4)
        self.run("finetune/lora.py", *train, *course)
        self.run("finetune/merge.py", "--adapter_dir", RUN, "--destination_path", MERGED, "--precision", "32-true")

    def run(self, *arguments: object) -> None:
        done = run_here(*arguments, cwd=self.home)
        assert done.returncode == 0, done.stderr
        self.commands.append(tuple(map(str, arguments)))
        self.said[" ".join(map(str, arguments[: 1 + ("delta" in str(arguments[0]))]))] = done.stderr


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return Story(tmp_path_factory.mktemp("story"))


def test_metas_files_become_a_folder_of_the_same_bits(story: Story) -> None:
    """Catches weights rounded on the way, shards laid together wrongly, and files that nobody compared."""
    found = load_file(story.home / BASE / "model.safetensors")
    assert_bits(found, story.base)
    assert json.loads((story.home / BASE / "config.json").read_text())["torch_dtype"] == "float16"
    assert "4 files are what checklist.chk says" in story.said["prepare/checkpoint.py"]


def test_base_and_delta_become_the_sum_that_was_published(story: Story) -> None:
    """Catches a policy that has to be known, a value added otherwise than in float16, and a tokenizer of the base."""
    assert "policy ziya: embedding and head as they are" in story.said["prepare/delta.py apply"]
    assert "prompt style ziya" in story.said["prepare/delta.py apply"]
    assert "bit for bit" in story.said["prepare/delta.py verify"]
    found = load_file(story.home / ZIYA / "model.safetensors")
    assert_bits(found, story.ziya)
    tokenizer = Tokenizer.from_path(story.home / ZIYA)
    assert (tokenizer.size, found[EMBEDDING].shape[0]) == (PIECES + 2, ROWS)
    assert (tokenizer.words["<human>"], tokenizer.words["<bot>"]) == (HUMAN, BOT)
    assert folder_style(story.home / ZIYA) == named_style("ziya")


def test_the_data_speaks_the_models_language(story: Story) -> None:
    """Catches <human> and <bot> cut into pieces that the model never saw, and what a user typed taken for them."""
    import datasets

    made = datasets.load_from_disk(str(story.home / DATA))
    assert {name: len(split) for name, split in made.items()} == {"train": 8, "test": 2}
    for row in (*made["train"], *made["test"]):
        ids, labels = row["input_ids"], row["labels"]
        assert ids[:2] == [1, HUMAN] and ids.count(HUMAN) == ids.count(BOT) == ids.count(END) == 1
        answer = ids.index(BOT) + 1
        while labels[answer] == -100:  # the colon
            answer += 1
        assert set(labels[:answer]) == {-100} and labels[answer:] == ids[answer:] and ids[-1] == END


def test_training_learns_the_rows(story: Story) -> None:
    """Catches a run that goes through and learns nothing."""
    with (story.home / RUN / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert losses[0] > 4 and sum(losses[-8:]) / 8 < 0.3, losses
    tested = [float(row["test_loss"]) for row in rows if row["test_loss"]]
    assert tested[-1] < tested[0] / 10


def test_the_merged_model_says_what_it_was_taught(story: Story) -> None:
    """Catches an answer that begins with a blank, runs on, or comes from a prompt of another form."""
    for row in ROWS_OF_DATA[2:4]:
        flags = ("--prompt", row["instruction"], "--input", row["input"], "--precision", "32-true")
        done = run_here("generate/instruct.py", "--checkpoint_dir", MERGED, *flags, cwd=story.home)
        assert (done.returncode, done.stdout) == (0, row["output"] + "\n"), done
    chat = ("generate/chat.py", "--checkpoint_dir", MERGED, "--temperature", 0, "--precision", "32-true")
    done = run_door(*chat, stdin=f"{ROWS_OF_DATA[1]['instruction']}\n", cwd=story.home)
    assert (done.returncode, done.stdout) == (0, ROWS_OF_DATA[1]["output"] + "\n"), done


def test_transformers_says_the_same(story: Story) -> None:
    """Catches a folder that only we can read, or that others ask with other ids: a space lost behind <human>."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = story.home / MERGED
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float16 and len(tokenizer) == PIECES + 2
    model.float()
    ours = Tokenizer.from_path(folder)
    for row in ROWS_OF_DATA[:2]:
        messages = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = prompt["input_ids"]
        assert ids[0].tolist() == prompt_ids(ours, named_style("ziya"), messages)
        made = model.generate(**prompt, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
        assert made[-1] == END
        assert tokenizer.decode(made, skip_special_tokens=True).removeprefix(" ") == row["output"]


def assert_bits(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == torch.float16
        assert torch.equal(found[name].view(torch.int16), value.view(torch.int16)), name


def test_the_page_tells_this_story(story: Story) -> None:
    """Catches a page whose commands, or whose folders, are not those that were run here."""
    told = [command.words[1:] for command in commands(ROOT / "docs" / "deltas.md")]
    last = told.index(("generate/chat.py", "--checkpoint_dir", MERGED))
    told = [words for words in told[:last] if words[0] != "prepare/download.py"]
    assert len(told) == len(story.commands) == 6
    for words, run in zip(told, story.commands, strict=True):
        assert words[0] == run[0] and set(words) <= set(run) | {"true"}, words
        assert set(run) & {"apply", "verify"} <= set(words), words
