"""Total and active parameters of any decoder with experts, to the parameter."""

import math
import random
from collections.abc import Iterator
from fnmatch import fnmatch

from ..exercise import Card, Step, runs, same
from ..observe import call

CARD = Card(
    "03", "Count the parameters", difficulty=2, importance=5, minutes=20, trains="tensor shapes, what 17B means"
)

HINTS = (
    "Write down the shape of every weight of one layer, then of what there is once a model. Two things depend on the "
    "layer: is it one of `moe_layers`, or dense? And two kinds of tensors grow with num_experts: which?",
    "Attention has four matrices: q and o between hidden_size and num_heads * head_dim, k and v between hidden_size "
    "and num_kv_heads * head_dim. A SwiGLU network has three: gate, up, down. A layer has two norms, the model one "
    "more.",
    "always = 2 * vocab * hidden + hidden + layers * (attention + 2 * hidden) + dense layers * 3 * hidden * "
    "dense_width + MoE layers * (router + shared experts). Then each MoE layer adds num_experts experts to the total, "
    "and only experts_per_token of them to what is active.",
)

ANSWERED_BY = ("minillama4.budget.count",)

LLAMA = dict(
    vocab_size=202048, hidden_size=5120, num_layers=48, num_heads=40, num_kv_heads=8, head_dim=128,
    experts_per_token=1, shared_experts=1, expert_width=8192, dense_width=16384,
)  # fmt: skip
SCOUT = LLAMA | {"num_experts": 16, "moe_layers": tuple(range(48))}
MAVERICK = LLAMA | {"num_experts": 128, "moe_layers": tuple(range(1, 48, 2))}
MIXTRAL = dict(
    vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, num_experts=8,
    experts_per_token=2, shared_experts=0, expert_width=14336, dense_width=14336, moe_layers=tuple(range(32)),
)  # fmt: skip
# (total, active), text only, with both embedding matrices.
KNOWN = {
    "Scout": (SCOUT, (107_769_861_120, 17_172_894_720)),
    "Maverick": (MAVERICK, (400_711_848_960, 17_184_691_200)),
    "Mixtral 8x7B": (MIXTRAL, (46_702_792_704, 12_879_925_248)),
}


def draw(rng: random.Random) -> dict:
    """Sizes for which no two known mistakes give the same count: hence primes, and a few fixed choices."""
    kv_heads, layers = rng.randint(2, 4), rng.choice((6, 7, 9))
    heads = kv_heads * rng.randint(2, 4)
    experts_per_token, shared_experts = rng.choice(((3, 3), (5, 2), (5, 3)))
    config = {
        "vocab_size": rng.choice((907, 911, 919, 929)),
        "hidden_size": heads * rng.randint(5, 8),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": 2 * rng.randint(5, 8),  # more than hidden_size / num_heads
        "num_experts": rng.choice((11, 13)),
        "experts_per_token": experts_per_token,
        "shared_experts": shared_experts,
        "expert_width": rng.randint(20, 50),
        "dense_width": rng.choice((61, 67, 71, 73, 79)),
        "moe_layers": tuple(sorted(rng.sample(range(layers), 2))),
    }
    return {"config": config, "known": {name: known for name, (known, _) in KNOWN.items()}}


def observe(function, inputs: dict) -> dict:
    config = inputs["config"]
    seen = call("dense", function, config | {"moe_layers": ()}) | call("sparse", function, config)
    for name, known in inputs["known"].items():
        seen |= call(name, function, known)
    return seen


def judge(inputs: dict, observed: dict):
    config = inputs["config"]
    dense = config | {"moe_layers": ()}
    sizes = ", ".join(f"{key} {value}" for key, value in config.items() if key != "moe_layers")
    given = f"{sizes}, moe_layers ()"
    yield from runs(observed, "dense", (2,), given, dtype="tuple")
    got = observed["dense/value"]
    yield Step(
        "both are whole numbers", got.dtype.kind == "i", given, str(got.tolist()), "two of type int",
        "Which line divides with `/`? Can a model have half a parameter?", "no whole numbers",
    )  # fmt: skip
    right = count(dense)
    yield same(
        "without experts, all of embedding, attention, FFN, norms and head counts, and is active", got, right, given,
        "Set sizes to 1 one by one: by how much does your count change, and how many tensors have that size?",
        {
            "embedding once": (
                count(dense, "lm_head"), "The embeddings are not tied. How many matrices of vocab_size rows are there?",
            ),
            "no embeddings": (
                count(dense, "lm_head", "embedding"), "Which of your terms has vocab_size in it, and how many should?",
            ),
            "lookup not active": (
                (right[0], count(dense, "embedding")[0]),
                "The task says what active includes. Is the embedding a part of it?",
            ),
            "embeddings not active": (
                (right[0], count(dense, "embedding", "lm_head")[0]),
                "The task says what active includes. Are the two large matrices a part of it?",
            ),
            "no final norm": (count(dense, "norm"), "What happens between the last layer and the output matrix?"),
            "one norm a layer": (
                count(dense, "*.post_attention_norm"), "Which two parts of a layer begin with a norm?",
            ),
            "no norms": (
                count(dense, "norm", "*_norm"), "How long is a norm's weight, and how many norms does a layer have?",
            ),
            "kv heads": (
                count(dense | {"num_kv_heads": config["num_heads"]}),
                "Five query heads of Scout share one key head. How many columns does your k matrix have?",
            ),
            "no output projection": (
                count(dense, "*.o_proj"), "What brings the heads' results back to hidden_size, after the attention?",
            ),
            "ignores head_dim": (
                count(dense | {"head_dim": config["hidden_size"] // config["num_heads"]}),
                "Is num_heads * head_dim always hidden_size? Which of the two is in your shapes?",
            ),
            "no attention": (count(dense, "*.?_proj"), "Which of your terms has head_dim in it?"),
            "two matrices": (
                count(dense, "*.up_proj"), "silu(gate(x)) * up(x), then down: how many matrices is that?",
            ),
            "no dense FFN": (count(dense, "*.ffn.*"), "What does a layer have after its attention, if no experts?"),
            "experts in every layer": (
                count(config | {"moe_layers": tuple(range(config["num_layers"]))}),
                "moe_layers is empty here. How many layers have experts?",
            ),
        },
    )  # fmt: skip
    given = f"{sizes}, moe_layers {config['moe_layers']}"
    yield from runs(observed, "sparse", (2,), given, dtype="tuple")
    total, active = count(config)
    moe_layers = len(config["moe_layers"])
    expert = 3 * config["hidden_size"] * config["expert_width"]
    yield same(
        "the total holds every expert, shared expert and router of the MoE layers", observed["sparse/value"][0], total,
        given, "Take num_experts one higher: your total should grow by how much, in how many layers?",
        {
            "ignores moe_layers": (right[0], "What does your function do with moe_layers?"),
            "only the active experts": (active, "Which experts must lie in memory: those of one token, or all?"),
            "no shared expert": (
                count(config | {"shared_experts": 0})[0], "Which expert does every token of a MoE layer go through?",
            ),
            "one shared expert": (
                count(config | {"shared_experts": 1})[0], f"shared_experts is {config['shared_experts']} here. Did you "
                "count that many?",
            ),
            "no router": (count(config, "*.router")[0], "What decides which expert a token gets, in which shape?"),
            "experts in every layer": (
                count(config | {"moe_layers": tuple(range(config["num_layers"]))})[0],
                "Which layers have experts? What do the others have?",
            ),
            "dense FFN everywhere": (
                total + moe_layers * 3 * config["hidden_size"] * config["dense_width"],
                "Does a layer with experts have a dense FFN as well?",
            ),
            "dense width": (
                count(config | {"expert_width": config["dense_width"]})[0], "How wide is one expert here?",
            ),
            "two matrices": (
                count(config, "*expert.*.up_proj")[0], "How many matrices does one expert have: gate, up and ...?",
            ),
            "one layer of experts": (
                total - (moe_layers - 1) * config["num_experts"] * expert, "How many layers have experts of their own?",
            ),
        },
    )  # fmt: skip
    yield same(
        "active: of the routed experts, only those that one token gets", observed["sparse/value"][1], active, given,
        "Which tensors does one token pass through in a MoE layer? Count those, and no others?",
        {
            "all experts": (total, "Through how many of the routed experts does one token go?"),
            "ignores experts_per_token": (
                count(config | {"experts_per_token": 1})[1],
                f"A token gets {config['experts_per_token']} experts here, and 2 in Mixtral. How many do you count?",
            ),
            "shared is one of them": (
                count(config | {"experts_per_token": config["experts_per_token"] - 1})[1],
                "Is the shared expert one of experts_per_token, or does it come on top?",
            ),
            "router inactive": (
                count(config, "*.router")[1], "Can a token be given an expert without multiplying by the router?",
            ),
            "shared inactive": (
                count(config | {"shared_experts": 0})[1], "Which tokens go through the shared experts: some, or all?",
            ),
            "one layer of experts": (
                active - (moe_layers - 1) * config["experts_per_token"] * expert,
                "In how many layers does a token get experts?",
            ),
        },
    )  # fmt: skip
    for name, (known, numbers) in KNOWN.items():
        given = f"{name}: {known['num_experts']} experts in {len(known['moe_layers'])} of {known['num_layers']} layers"
        yield from runs(observed, name, (2,), given, dtype="tuple")
        yield same(
            f"{name}: {numbers[0]:,} in all, {numbers[1]:,} active", observed[f"{name}/value"], numbers, given,
            "Small models came out right. Is there a number in your function that belongs to one model only?",
        )  # fmt: skip


def count(config: dict, *without: str) -> tuple[int, int]:
    """(total, active), tensor by tensor, leaving out those whose name fits a pattern of `without`."""
    total = active = 0
    for name, shape, used in tensors(config):
        if not any(fnmatch(name, pattern) for pattern in without):
            total += math.prod(shape)
            active += math.prod(shape) * used
    return total, active


def tensors(c: dict) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """(name, shape, does one token use it?) of every tensor; each expert by itself."""
    hidden = c["hidden_size"]

    def network(name: str, width: int, used: bool):
        yield f"{name}.gate_proj", (width, hidden), used
        yield f"{name}.up_proj", (width, hidden), used
        yield f"{name}.down_proj", (hidden, width), used

    yield "embedding", (c["vocab_size"], hidden), True
    yield "norm", (hidden,), True
    yield "lm_head", (c["vocab_size"], hidden), True
    for layer in range(c["num_layers"]):
        yield f"{layer}.input_norm", (hidden,), True
        yield f"{layer}.post_attention_norm", (hidden,), True
        yield f"{layer}.q_proj", (c["num_heads"], c["head_dim"], hidden), True
        yield f"{layer}.k_proj", (c["num_kv_heads"], c["head_dim"], hidden), True
        yield f"{layer}.v_proj", (c["num_kv_heads"], c["head_dim"], hidden), True
        yield f"{layer}.o_proj", (hidden, c["num_heads"], c["head_dim"]), True
        if layer not in c["moe_layers"]:
            yield from network(f"{layer}.ffn", c["dense_width"], True)
            continue
        yield f"{layer}.router", (c["num_experts"], hidden), True
        for expert in range(c["num_experts"]):
            yield from network(f"{layer}.expert.{expert}", c["expert_width"], expert < c["experts_per_token"])
        for expert in range(c["shared_experts"]):
            yield from network(f"{layer}.shared_expert.{expert}", c["expert_width"], True)
