"""Answers to `moe-parameters`."""

from bank import right, wrong


@right
def layer_by_layer(config):
    c = config
    model = total = c["hidden_size"] * (1 + c["vocab_size"] + c["vocab_size"])
    active = model
    for layer in range(c["num_layers"]):
        shared = c["hidden_size"] * (2 + 2 * c["head_dim"] * (c["num_heads"] + c["num_kv_heads"]))
        spare = 0
        if layer in c["moe_layers"]:
            one = c["hidden_size"] * c["expert_width"] * 3
            shared += c["num_experts"] * c["hidden_size"] + (c["shared_experts"] + c["experts_per_token"]) * one
            spare = (c["num_experts"] - c["experts_per_token"]) * one
        else:
            shared += c["hidden_size"] * c["dense_width"] * 3
        total, active = total + shared + spare, active + shared
    return total, active


def formula(
    c, *, embeddings=2, final_norm=1, norms=2, projections=4, kv=None, head_dim=None, matrices=3, expert_matrices=3,
    shared=None, router=1, router_active=1, shared_active=1, moe=None, dense=None, expert_width=None, per_token=None,
    in_memory=None, lookup=1,
):  # fmt: skip
    """The right counts, but for what is given."""
    hidden, layers = c["hidden_size"], c["num_layers"]
    moe = len(c["moe_layers"]) if moe is None else moe
    dense = layers - moe if dense is None else dense
    kv = c["num_kv_heads"] if kv is None else kv
    head_dim = c["head_dim"] if head_dim is None else head_dim
    shared = c["shared_experts"] if shared is None else shared
    per_token = c["experts_per_token"] if per_token is None else per_token
    in_memory = c["num_experts"] if in_memory is None else in_memory
    attention = hidden * head_dim * ((projections - 2) * c["num_heads"] + 2 * kv)
    expert = expert_matrices * hidden * (expert_width or c["expert_width"])
    always = embeddings * c["vocab_size"] * hidden + final_norm * hidden + layers * (attention + norms * hidden)
    always += dense * matrices * hidden * c["dense_width"]
    routers, shared = router * moe * c["num_experts"] * hidden, moe * shared * expert
    active = always + routers * router_active + shared * shared_active + moe * per_token * expert
    return always + routers + shared + moe * in_memory * expert, active - (1 - lookup) * c["vocab_size"] * hidden


@wrong("not written")
def stub(config):
    raise NotImplementedError()


@wrong("raises")
def as_attributes(config):
    return config.hidden_size, config.hidden_size


@wrong("type")
def total_only(config):
    return formula(config)[0]


@wrong("shape")
def with_the_share(config):
    total, active = formula(config)
    return total, active, active


@wrong("no whole numbers")
def in_billions(config):
    total, active = formula(config)
    return total / 1e9, active / 1e9


@wrong("changes its input")
def takes_the_layers_out(config):
    moe = len(config.pop("moe_layers"))
    return formula(config | {"moe_layers": range(moe)})


@wrong("without experts, all of embedding, attention, FFN, norms and head counts, and is active")
def shape_only(config):
    return 1, 1


@wrong("embedding once")
def tied_embeddings(config):
    return formula(config, embeddings=1)


@wrong("no embeddings")
def layers_only(config):
    return formula(config, embeddings=0)


@wrong("lookup not active")
def lookup_not_active(config):
    return formula(config, lookup=0)


@wrong("embeddings not active")
def embeddings_not_active(config):
    return formula(config)[0], formula(config, embeddings=0)[1]


@wrong("no final norm")
def no_final_norm(config):
    return formula(config, final_norm=0)


@wrong("one norm a layer")
def one_norm_a_layer(config):
    return formula(config, norms=1)


@wrong("no norms")
def no_norms(config):
    return formula(config, norms=0, final_norm=0)


@wrong("kv heads")
def every_head_has_its_own_key(config):
    return formula(config, kv=config["num_heads"])


@wrong("no output projection")
def no_output_projection(config):
    return formula(config, projections=3)


@wrong("ignores head_dim")
def ignores_head_dim(config):
    return formula(config, head_dim=config["hidden_size"] // config["num_heads"])


@wrong("no attention")
def no_attention(config):
    return formula(config, head_dim=0)


@wrong("two matrices")
def classic_ffn(config):
    return formula(config, matrices=2, expert_matrices=2)


@wrong("no dense FFN")
def no_dense_layers(config):
    return formula(config, dense=0)


@wrong("experts in every layer")
def experts_in_every_layer(config):
    return formula(config, moe=config["num_layers"])


@wrong("experts in every layer")
def unless_there_are_none(config):
    return formula(config, moe=config["num_layers"] if config["moe_layers"] else 0)


@wrong("ignores moe_layers")
def no_experts_at_all(config):
    return formula(config, moe=0)


@wrong("only the active experts")
def swapped(config):
    return formula(config)[::-1]


@wrong("only the active experts")
def active_in_memory(config):
    return formula(config, in_memory=config["experts_per_token"])


@wrong("no shared expert")
def no_shared_expert(config):
    return formula(config, shared=0)


@wrong("one shared expert")
def one_shared_expert(config):
    return formula(config, shared=1)


@wrong("no router")
def no_router(config):
    return formula(config, router=0)


@wrong("dense FFN everywhere")
def dense_everywhere(config):
    return formula(config, dense=config["num_layers"])


@wrong("dense width")
def one_width(config):
    return formula(config, expert_width=config["dense_width"])


@wrong("two matrices")
def experts_of_two_matrices(config):
    return formula(config, expert_matrices=2)


@wrong("one layer of experts")
def one_layer_of_experts(config):
    total, active = formula(config)
    again = max(0, len(config["moe_layers"]) - 1)
    return total - again * config["num_experts"] * 3 * config["hidden_size"] * config["expert_width"], active


@wrong("one layer of experts")
def one_active_layer_of_experts(config):
    total, active = formula(config)
    again = max(0, len(config["moe_layers"]) - 1)
    return total, active - again * config["experts_per_token"] * 3 * config["hidden_size"] * config["expert_width"]


@wrong("all experts")
def all_active(config):
    total, _ = formula(config)
    return total, total


@wrong("ignores experts_per_token")
def top_1(config):
    return formula(config, per_token=1)


@wrong("shared is one of them")
def shared_is_one_of_them(config):
    return formula(config, per_token=config["experts_per_token"] - 1)


@wrong("router inactive")
def router_inactive(config):
    return formula(config, router_active=0)


@wrong("shared inactive")
def shared_inactive(config):
    return formula(config, shared_active=0)


@wrong("Scout: 107,769,861,120 in all, 17,172,894,720 active")
def with_the_picture_encoder(config):
    vision = 871_932_416 if config["vocab_size"] == 202048 else 0
    total, active = formula(config)
    return total + vision, active


@wrong("Mixtral 8x7B: 46,702,792,704 in all, 12,879,925,248 active")
def at_least_one_shared(config):
    return formula(config, shared=max(1, config["shared_experts"]))


EQUIVALENT = {"tuple[int, int]  ->  tuple": "it is an annotation and changes no value"}
