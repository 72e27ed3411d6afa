"""Text <-> token ids, and the chat format: byte-level BPE with Llama 4's word split and special tokens.

    text     --split into words--> UTF-8 bytes --merge pairs by rank--> ids below the first special token
    messages --> <|begin_of_text|> then, per message, <|header_start|> role <|header_end|> "\\n\\n" content <|eot|>

The released tokenizer has 200,000 ordinary entries, then 2,048 special tokens; the mini one 1,000, then 24. Special
tokens come from code only: the text "<|eot|>" in a user's message is encoded as the seven characters it is.
Source: Meta's llama-models, models/llama4/tokenizer.py and chat_format.py (facts section 3).
"""

import json
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import chain, repeat
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

# A word is one optional leading space or sign, then letters (upper case first) with their combining marks; numbers are
# cut into groups of three digits; a run of newlines is one piece. The same pattern as OpenAI's `o200k_base`.
SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|"
    r"\s+(?!\S)|"
    r"\s+"
)

# The named special tokens of the released models (the other ids from 200000 to 202047 are reserved).
LLAMA4_SPECIAL_TOKENS: dict[str, int] = {
    "<|begin_of_text|>": 200000,  # BOS, once per sequence
    "<|end_of_text|>": 200001,
    "<|fim_prefix|>": 200002,  # fill in the middle, for code
    "<|fim_middle|>": 200003,
    "<|fim_suffix|>": 200004,
    "<|header_start|>": 200005,
    "<|header_end|>": 200006,
    "<|eom|>": 200007,  # end of a message after which the same side goes on (a tool call)
    "<|eot|>": 200008,  # end of a turn
    "<|step|>": 200009,
    "<|python_start|>": 200016,
    "<|python_end|>": 200017,
    "<|finetune_right_pad|>": 200018,
    "<|image_start|>": 200080,
    "<|image_end|>": 200081,
    "<|tile_x_separator|>": 200084,
    "<|tile_y_separator|>": 200085,
    "<|image|>": 200090,  # in the model's input: the global tile follows. In a chat template: a picture goes here
    "<|patch|>": 200092,
    "<|reasoning_thinking_start|>": 201142,  # unused by the released models
    "<|reasoning_thinking_end|>": 201143,
}

_MINI_FIRST_SPECIAL = 1000
_MINI_NAMES = """begin_of_text end_of_text fim_prefix fim_middle fim_suffix header_start header_end eom eot step
    image_start image_end tile_x_separator tile_y_separator image patch python_start python_end finetune_right_pad
    reasoning_thinking_start reasoning_thinking_end
    reserved_special_token_0 reserved_special_token_1 reserved_special_token_2""".split()
MINI_SPECIAL_TOKENS: dict[str, int] = {f"<|{name}|>": _MINI_FIRST_SPECIAL + i for i, name in enumerate(_MINI_NAMES)}

# What `transformers` runs to turn messages into text. It writes one `<|image|>` per picture, as its processor expects.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {{- '<|header_start|>' + role + '<|header_end|>' + '\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- '<|image|>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>' + '\\n\\n' }}
{%- endif %}
"""

ROLES = ("system", "user", "assistant", "ipython", "tool")  # "tool" is written "ipython", as Meta does

_WEIGHTS = Path(__file__).parent / "weights"  # where presets that ship weights keep their tokenizer
_CHAT_TOKENS = ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|image|>")


class Tokenizer:
    """Byte-level BPE over Hugging Face `tokenizers`, with the two rules it lacks: no injection, no silent bad id.

    special_tokens: name -> id. special_names: id -> name. vocab_size: entries, special ones included.
    """

    def __init__(self, bpe: tokenizers.Tokenizer):
        self._bpe = bpe
        self._bpe.encode_special_tokens = True  # that is: encode their text like any other text
        added = bpe.get_added_tokens_decoder()
        self.special_names = {id: token.content for id, token in added.items() if token.special}
        self.special_tokens = {name: id for id, name in self.special_names.items()}
        self.vocab_size = bpe.get_vocab_size()
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`, without BOS.

        special: read "<|eot|>" and the like as special tokens. Only for text that you wrote yourself.
        """
        if not isinstance(text, str):
            raise ValueError(f"text is {type(text).__name__}; it must be a str")
        if not special:
            return self._encode_words(text)
        ids = []
        for piece in self._special_pattern.split(text):
            ids += [self.special_tokens[piece]] if piece in self.special_tokens else self._encode_words(piece)
        return ids

    def _encode_words(self, text: str) -> list[int]:
        try:
            return self._bpe.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):
            raise ValueError(f"text holds half a surrogate pair, which is no character: {ascii(text[:40])}") from None

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids` (a list or a 1-D tensor). Bytes that are not UTF-8, as in half a character, become U+FFFD.

        ValueError: an id out of range.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        wrong = [id for id in ids if not 0 <= id < self.vocab_size]
        if wrong:
            raise ValueError(f"ids holds {wrong[0]}; ids run from 0 to {self.vocab_size - 1}")
        return self._bpe.decode(ids, skip_special_tokens=skip_special)

    def token_id(self, name: str) -> int:
        """The id of one special token, such as "<|eot|>". ValueError: no such token, with the nearest names."""
        if name not in self.special_tokens:
            near = get_close_matches(str(name), self.special_tokens, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"unknown special token {name!r}{hint}")
        return self.special_tokens[name]

    def encode_chat(self, messages: Sequence[dict], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, one `<|image|>` per picture (`fusion.build_prompt` puts the tiles there).

        messages: [{"role": "user", "content": "text"}], or content as a list of {"type": "text", "text": ...} and
            {"type": "image", ...}. Roles: system, user, assistant, tool (or "ipython").
        add_generation_prompt: end with the assistant's header, so that the next token is its answer.

        Like Meta's code, it encodes header and content apart and trims nothing. `transformers` encodes them as one
        text, which can give other ids in one case: content that begins with white space and a newline. It also reads
        special tokens inside content; we do not.
        ValueError: a message without these fields, or of another type.
        """
        ids = [self.token_id("<|begin_of_text|>")]
        for number, message in enumerate(messages):
            role, parts = _checked(message, number)
            ids += self.encode_header(role)
            for part in parts:
                ids += [self.token_id("<|image|>")] if part["type"] == "image" else self.encode(part["text"])
            ids.append(self.token_id("<|eot|>"))
        return ids + self.encode_header("assistant") if add_generation_prompt else ids

    def encode_header(self, role: str) -> list[int]:
        """What opens a message: `<|header_start|>` role `<|header_end|>` and two newlines."""
        name = self.encode("ipython" if role == "tool" else role)
        return [self.token_id("<|header_start|>"), *name, self.token_id("<|header_end|>"), *self.encode("\n\n")]

    _header = encode_header

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`, made if need be.

        `transformers.AutoTokenizer.from_pretrained(folder)` and its `apply_chat_template` then give the same ids.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot|>",
            "pad_token": "<|finetune_right_pad|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",
        }
        (folder / "tokenizer.json").write_text(self._bpe.to_str(pretty=True) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in `folder` (its tokenizer.json), or that of a preset with weights, such as "mini-scout".

    ValueError: no such folder or file, a file that cannot be read, or one without Llama 4's chat tokens.
    """
    path = Path(folder)
    if not path.exists() and (_WEIGHTS / str(folder)).is_dir():
        path = _WEIGHTS / str(folder)
    if not path.is_dir():
        shipped = sorted(entry.parent.name for entry in _WEIGHTS.glob("*/tokenizer.json"))
        hint = f", or a preset with weights: {', '.join(shipped)}" if shipped else ""
        raise ValueError(f"no folder {str(folder)!r}; give one that holds tokenizer.json{hint}")
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"no tokenizer.json in {str(path)!r}")
    try:
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8")))
    except Exception as error:  # `tokenizers` raises bare Exception for whatever it cannot read
        raise ValueError(f"cannot read {str(file)!r}: {' '.join(str(error).split())}") from None
    missing = [name for name in _CHAT_TOKENS if name not in tokenizer.special_tokens]
    if missing:
        raise ValueError(f"{str(file)!r} is no Llama 4 tokenizer: it has no special token {', '.join(missing)}")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> Tokenizer:
    """A mini tokenizer learned from `texts`: 256 bytes, then merges, then the special tokens in the last 24 ids.

    A text counts as often as it is given. "\\n\\n" and the names of the roles are made one token each, whatever the
    texts hold. If these give fewer merges than there is room for, entries that nothing encodes to fill up the rest,
    so special ids never move. The same texts give the same tokenizer.
    """
    first_special, smallest = vocab_size - len(MINI_SPECIAL_TOKENS), 300
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; bytes, role names and special tokens need at least {smallest}")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=first_special, initial_alphabet=alphabet, show_progress=False)
    texts = list(texts)
    frame = ("\n\n", *ROLES[:4])  # every prompt holds these, so each shall be one token
    bpe.train_from_iterator(chain(texts, *(repeat(piece, len(texts) + 100) for piece in frame)), trainer)
    return Tokenizer(_add_fixed_ids(bpe, first_special))


def _add_fixed_ids(bpe: tokenizers.Tokenizer, first_special: int) -> tokenizers.Tokenizer:
    """The trained model with its vocabulary filled up to `first_special`, special tokens behind it, and BOS rule."""
    state = json.loads(bpe.to_str())
    vocabulary = state["model"]["vocab"]
    for id in range(len(vocabulary), first_special):
        vocabulary[f"<unused {id}>"] = id  # no merge leads here
    bpe = tokenizers.Tokenizer.from_str(json.dumps(state))
    bpe.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in MINI_SPECIAL_TOKENS])
    bos = "<|begin_of_text|>"
    # For `transformers` only: calling its tokenizer on a plain text puts BOS in front, as with the released models.
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    return bpe


def _checked(message: dict, number: int) -> tuple[str, list[dict]]:
    """(role, parts) of one message; plain text becomes one part."""
    where = f"messages[{number}]"
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"{where} is {message!r:.60}; it must be a dict with 'role' and 'content'")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{where}: role is {role!r:.60}; it must be one of {', '.join(ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)):
        raise ValueError(f"{where}: content is {type(content).__name__}; it must be a str or a list of parts")
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise ValueError(f"{where}: part {part!r:.60} has neither type 'text' with a 'text' nor type 'image'")
    return role, list(parts)
