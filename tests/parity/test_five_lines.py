"""The five lines that everybody writes first run on a folder of ours, offline and unchanged, and say what we say.

What they print on the way, and why:

- LOAD REPORT ... UNEXPECTED: "text-generation" takes the text model alone (`Llama4ForCausalLM`), so the tensors of
  `vision_model` and `multi_modal_projector` find no place. None may be MISSING: that one would be made up at random.
- "high_freq_factor field must be greater than low_freq_factor": both are 1 in the released Scout as well, which leaves
  nothing to blend (`config.RopeScaling`); transformers warns and computes the same.
- "`torch_dtype` is deprecated": the argument is called `dtype` now; "auto" reads the dtype out of config.json.

With the released Scout, only `folder` changes (217 GB in bf16, spread by `device_map` over what there is), and the
answer is drawn at random, because its generation_config.json asks for sampling; ours says greedy.
"""

import pytest
import torch
import transformers

from minillama4 import generate, load_checkpoint, load_tokenizer, save_checkpoint

QUESTION = "Explain MoE routing in two sentences."
FAR_FROM_TRAINING = (
    "Write a poem about the rain in Paris."  # so several next tokens are likely, and sampling would show
)


@pytest.fixture(scope="module")
def ours():
    return load_checkpoint("mini-scout"), load_tokenizer("mini-scout")


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("five-lines")
    save_checkpoint(ours[0], folder, tokenizer=ours[1])
    return str(folder)


@pytest.fixture(scope="module")
def answered(folder):
    """The five lines, to the letter."""
    from transformers import pipeline

    messages = [{"role": "user", "content": "Explain MoE routing in two sentences."}]
    pipe = pipeline("text-generation", model=folder, device_map="auto", torch_dtype="auto")
    output = pipe(messages)
    print(output[0]["generated_text"][-1]["content"])
    return pipe, output


def greedy(ours, question: str) -> tuple[list[int], list[int]]:
    """(prompt, answer) in tokens, by our own tokenizer, model and `generate`."""
    model, tokenizer = ours
    prompt = tokenizer.encode_chat([{"role": "user", "content": question}])
    answer = generate(model, [torch.tensor(prompt)], max_new_tokens=256, stop_tokens=model.config.stop_tokens)
    return prompt, answer[0].tolist()


def test_the_answer_is_ours_to_the_letter(ours, answered):
    _, output = answered
    _, answer = greedy(ours, QUESTION)
    assert output[0]["generated_text"] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ours[1].decode(answer)},
    ]
    assert len(answer) > 40, "an answer of a few tokens proves little"


def test_prompt_and_answer_are_the_same_tokens(ours, answered):
    """Chat template, BOS once, greedy choice, and the stop token at the end."""
    pipe, _ = answered
    prompt, answer = greedy(ours, FAR_FROM_TRAINING)
    got = pipe([{"role": "user", "content": FAR_FROM_TRAINING}], return_tensors=True)[0]["generated_token_ids"]
    assert got == prompt + answer
    assert answer[-1] in ours[0].config.stop_tokens


def test_the_pipeline_neither_samples_nor_rounds(answered):
    pipe, _ = answered
    kwargs = pipe._prepare_generate_kwargs({})
    assert pipe.model.generation_config.do_sample is False and "temperature" not in kwargs
    assert pipe.model.dtype == torch.float32


def test_the_load_report_names_vision_only_and_nothing_missing(folder):
    """What the lesson explains about it stays true."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is transformers.Llama4ForCausalLM
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert {key.split(".")[0] for key in report["unexpected_keys"]} == {"vision_model", "multi_modal_projector"}
