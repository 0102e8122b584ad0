"""The acceptance checklist of Ollama's HTTP contract: its rows, and what proves those that are not asked here."""

from __future__ import annotations

ROWS = {
    1: "/ GET, HEAD",
    2: "/api/version",
    3: "unknown paths and wrong methods",
    4: "bodies of any POST",
    5: "origins",
    6: "hosts",
    7: "tags: order, digests, external changes",
    8: "tags: details",
    9: "ps",
    10: "show: names and refusals",
    11: "show: model_info",
    12: "show: parameters, modelfile, template, capabilities",
    13: "show: verbose",
    14: "generate: stream",
    15: "generate: whole",
    16: "generate: load and unload",
    17: "generate: names",
    18: "generate: raw",
    19: "generate: system, template, messages, context",
    20: "generate: suffix",
    21: "generate: images",
    22: "format",
    23: "think",
    24: "logprobs",
    25: "_debug_render_only",
    26: "options",
    27: "num_predict and natural ends",
    28: "failures before and within a stream",
    29: "disconnects",
    30: "chat: load, unload, no model",
    31: "chat: roles, system, messages",
    32: "chat: tool calls",
    33: "chat: tool results",
    34: "chat: capabilities that are missing",
    35: "chat: role and content in every object",
    36: "chat: truncation and shift",
    37: "chat: thinking apart from content",
    38: "embed",
    39: "embeddings",
    40: "pull: success",
    41: "pull: failures, other registries",
    42: "push",
    43: "copy",
    44: "delete",
    45: "blobs",
    46: "create from a model",
    47: "create from files",
    48: "create: pulls, whole answers, template errors",
    49: "create: config and detected templates",
    50: "names",
    51: "store",
    52: "template language",
    53: "template modes",
    54: "scheduler",
    55: "environment",
    56: "status, me, signout, experimental",
    57: "command line",
    58: "client packages",
    59: "/v1",
}

ELSEWHERE = {
    20: ["tests/compat/ollama/test_ollama_parse.py::test_what_the_model_cannot_do_is_refused"],
    28: ["tests/e2e/test_server.py::test_a_worker_that_is_killed_mid_stream_is_an_error_on_record_and_is_replaced"],
    29: ["tests/e2e/test_server.py::test_a_client_that_leaves_is_recorded_with_what_it_cost"],
    36: ["tests/e2e/test_server.py::test_an_over_long_prompt_is_refused_in_each_dialects_words_or_cut"],
    37: [
        "tests/compat/ollama/test_ollama_parse.py::test_old_reasoning_inside_answers_is_taken_out_for_models_that_put_it_there"
    ],
    40: [
        "tests/engines/store/test_transfer.py::test_a_later_pull_goes_on_where_one_was_left",
        "tests/engines/store/test_transfer.py::test_two_callers_share_one_download",
        "tests/engines/store/test_download.py::test_other_bytes_than_promised_never_become_a_blob",
    ],
    42: [
        "tests/e2e/test_registry_server.py::test_ollamas_client_pushes_and_pulls_a_model_that_then_answers",
        "tests/engines/store/test_transfer.py::test_a_layer_is_mounted_from_the_model_it_came_from",
        "tests/engines/store/test_registry_auth.py::test_ollamas_registry_gets_a_signed_request",
        "tests/engines/store/test_upload.py::test_chunks_go_where_the_registry_redirects_them",
    ],
    47: ["tests/engines/store/test_create.py::test_a_split_model_becomes_one_file"],
    50: ["tests/engines/store/test_names.py::test_what_the_grammar_forbids_is_refused_as_typed"],
    52: ["tests/engines/chat/test_gotemplate.py::test_every_construct_does_what_it_does_in_go"],
    53: ["tests/engines/chat/test_gotemplate.py::test_chats_are_rendered_as_ollama_renders_them"],
    54: [
        "tests/gateway/test_pool.py::test_a_request_without_keep_alive_leaves_the_residents_value",
        "tests/gateway/test_pool.py::test_a_full_queue_refuses_at_once_and_leaves_everybody_else_alone",
        "tests/gateway/test_pool.py::test_the_least_recently_used_idle_runner_is_evicted",
    ],
    55: ["tests/gateway/test_settings.py::test_each_variable_is_read"],
    57: ["tests/e2e/test_registry_server.py::test_the_command_line_pushes_and_pulls"],
    58: ["tests/e2e/test_server.py::test_ollama_client_lists_shows_and_sees_what_runs"],
}
"""Tests that prove the part of a row which needs a registry, a fault or a clock; the rest of the row runs here."""

EXCLUDED: dict[int, str] = {}
"""Rows of which nothing is run, and why."""

PARTS_EXCLUDED: dict[tuple[int, str], str] = {
    (
        34,
        "an embedding model refuses chat",
    ): "needs an embedding model; refused by parse, which the test of row 20 shows",
    (47, "projectors"): "needs weights for pictures",
    (47, "safetensors"): "refused with what to do instead, a divergence that the dialect lists",
    (13, "projector_info"): "needs a model with a projector",
    (9, "size_vram above 0"): "needs a GPU",
    (41, "hf.co names"): "needs Hugging Face",
    (49, "detected templates"): "the weights' own template is used, a divergence that the dialect lists",
    (48, "a missing `from` is pulled with success"): "needs a public registry; that the pull is tried is run",
    (51, "Ollama reads our directory"): "needs Ollama's own binary",
    (58, "ollama-js, Open WebUI, LangChain"): "need Node and programs that are no dependency of the tests",
}
"""Parts of rows that need what a test machine does not have."""
