"""Arguments of SGLang for a drafter's folder, its answers, and on a real server the text of transformers."""

import http.server
import json
import threading

import pytest
import torch
from transformers import LlamaForCausalLM

from aurora_rl.envs import Request, SamplingParams
from aurora_rl.envs.sglang.client import SGLangClient, SGLangError, cores_of, drafter_arguments, ranks_of
from aurora_rl.policies import Eagle3Drafter, EagleDrafter, MedusaDrafter, TargetParts
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_target

PART, WHOLE = torch.tensor([2, 7, 11, 30]), torch.arange(32)


@pytest.mark.parametrize(
    ("kind", "vocab", "algorithm", "mapped"),
    [
        (Eagle3Drafter, PART, "EAGLE3", False),
        (EagleDrafter, PART, "EAGLE", True),
        (EagleDrafter, WHOLE, "EAGLE", False),
    ],
)
def test_the_algorithm_and_the_draft_vocabulary_are_those_of_the_folder(tmp_path, kind, vocab, algorithm, mapped):
    layers = {"feature_layers": (1, 2)} if kind is Eagle3Drafter else {}
    drafter = kind.from_target(TargetParts.of(tiny_target(dtype=torch.float32)), draft_vocab=vocab, **layers)
    save_drafter(drafter, tmp_path / "drafter", "sglang")
    token_map = tmp_path / "token_map.pt"
    arguments = drafter_arguments(tmp_path / "drafter", token_map)
    expected = ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(tmp_path / "drafter")]
    assert arguments == expected + (["--speculative-token-map", str(token_map)] if mapped else [])
    assert token_map.exists() == mapped
    if mapped:
        # As SGLang reads it.
        assert torch.tensor(torch.load(token_map, weights_only=True), dtype=torch.int64).tolist() == vocab.tolist()


def test_a_folder_that_does_not_learn_with_sglang_is_named(tmp_path):
    drafter = MedusaDrafter.from_target(TargetParts.of(tiny_target(dtype=torch.float32)), draft_vocab=WHOLE)
    save_drafter(drafter, tmp_path / "drafter")
    with pytest.raises(CheckpointError, match="drafter: config.json is of MedusaDrafter, which does not learn with SG"):
        drafter_arguments(tmp_path / "drafter", tmp_path / "token_map.pt")


def test_a_folder_without_a_drafter_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a checkpoint"):
        drafter_arguments(tmp_path / "nowhere", tmp_path / "token_map.pt")


class Answers(http.server.BaseHTTPRequestHandler):
    asked = {}

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        params = body["sampling_params"]
        self.asked[body["rid"]] = params.get("custom_params"), params["ignore_eos"], body["cache_salt"]
        status, text = {
            "0": (200, json.dumps({"output_ids": body["input_ids"], "meta_info": {"finish_reason": {"type": "stop"}}})),
            "1": (400, "the input is too long"),
            "2": (200, "<html>"),
        }[body["rid"]]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


def test_answers_refusals_and_nonsense_of_a_server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            with SGLangClient(url + "/") as client:
                unrecorded = Request(0, torch.tensor([3, 4]), SamplingParams(max_tokens=5), learn=False)
                completion = client.generate(unrecorded, timeout=10)
                assert (completion.tokens.tolist(), completion.terminated) == ([3, 4], True)
                with pytest.raises(SGLangError, match="SGLang refuses /generate: the input is too long"):
                    refused = Request(1, torch.tensor([3]), SamplingParams(ignore_eos=True), cache_salt="a")
                    client.generate(refused, timeout=10)
                with pytest.raises(SGLangError, match=f"SGLang at {url} does not answer /generate"):
                    client.generate(Request(2, torch.tensor([3]), SamplingParams(max_tokens=5)), timeout=10)
                with pytest.raises(SGLangError, match="request 3: speculative=false is not supported by SGLang; leave"):
                    client.generate(Request(3, torch.tensor([3]), speculative=False))
                with pytest.raises(SGLangError, match="request 4: logprobs are not asked of SGLang by this client"):
                    client.generate(Request(4, torch.tensor([3]), SamplingParams(logprobs=1)))
                with pytest.raises(SGLangError, match="request 5: min_p=0.1 is not supported by SGLang, .*; leave it"):
                    client.generate(Request(5, torch.tensor([3]), SamplingParams(temperature=0.5, min_p=0.1)))
                assert Answers.asked == {
                    "0": ({"aurora_rl": False}, False, None), "1": (None, True, "a"), "2": (None, False, None),
                }  # fmt: skip
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("url", ["localhost:9", "http://[", "http://127.0.0.1:9"])
def test_an_address_where_nobody_answers_is_named(url):
    with pytest.raises(SGLangError, match="does not answer /generate"):
        SGLangClient(url).generate(Request(0, torch.tensor([1]), SamplingParams(max_tokens=1)))


def test_a_server_that_cannot_start_says_why():
    # With nothing but Python's own packages on the path there is no SGLang to start.
    with pytest.raises(SGLangError, match=r"(?s)SGLang ended with status 1.*(No module named|ImportError)"):
        SGLangClient.launch("nowhere", environment={"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"})


def test_a_server_that_is_not_there_is_named():
    engine = SGLangClient("http://127.0.0.1:9/")
    with pytest.raises(SGLangError, match=r"SGLang at http://127.0.0.1:9 does not answer /generate"):
        engine.generate(Request(0, torch.tensor([1]), SamplingParams(max_tokens=1)))
    with pytest.raises(SGLangError, match="does not answer after 0 s"):
        engine.wait_ready(0.1)


# ---- on real SGLang, unpatched, with our plugin ---------------------------------------------------------------------

PROMPTS = [torch.tensor([10, 20, 30, 40, 50]), torch.arange(100, 140), torch.tensor([7])]
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def greedy_texts(sglang_models):
    """Greedy continuations in fp32, token for token."""
    model = LlamaForCausalLM.from_pretrained(sglang_models / "target", dtype=torch.float32)
    continuations = []
    for prompt in PROMPTS:
        said = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        continuations.append(said[0, len(prompt) :].tolist())
    return continuations


@pytest.mark.sglang
@pytest.mark.parametrize(("kind", "depth"), [("chain", 3), ("tree", 2)])
def test_greedy_output_is_that_of_transformers(request, kind, depth, greedy_texts):
    engine = request.getfixturevalue(kind)
    # The second prompt twice: then it is found in the prefix cache.
    answers = [
        engine.generate(Request(i, p, SamplingParams(max_tokens=NEW_TOKENS)))
        for i, p in enumerate([*PROMPTS, PROMPTS[1]])
    ]
    assert [answer.tokens.tolist() for answer in answers] == [*greedy_texts, greedy_texts[1]]
    # What has to be told apart from plain decoding: whole paths accepted, and rounds in which nothing was.
    assert {count for answer in answers for count in answer.accepted} == set(range(depth + 1))
    assert all(answer.drafted >= answer.rounds * depth > 0 for answer in answers)


@pytest.mark.sglang
def test_a_salt_keeps_prefixes_apart(chain):
    prompt = torch.arange(300, 340)

    def cached(salt):
        body = {"input_ids": prompt.tolist(), "sampling_params": {"max_new_tokens": 1}, "cache_salt": salt}
        return chain.post("/generate", body, 60)["meta_info"]["cached_tokens"]

    first, again = ([cached(salt) for salt in ("a", "b", None)] for _ in range(2))
    assert first == [0, 0, 0] and min(again) > 30


@pytest.mark.parametrize(
    "names", [("--tp-size", "--dp-size"), ("--tp", "--dp"), ("--tensor-parallel-size", "--data-parallel-size")]
)
def test_ranks_and_replicas_are_read_from_sglangs_arguments(names: tuple[str, str]) -> None:
    assert ranks_of([names[0], "4", f"{names[1]}=2"]) == 8
    assert ranks_of(["--log-level", "info"]) == 1


def test_ranks_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 1, 7, 5})
    assert (cores_of(2), cores_of(4), cores_of(5)) == ("1,3|5,7", "1|3|5|7", "1|3|5|7|1")
