import json

import pytest

import agents
from compression.refusal import Refusal, nearest
from search.config import AGENTS, GRANULARITIES, PROXIES, PROXY_FORMS, QUICK, RECORDED, RETIRED, Config, read_fields
from search.trials.fingerprints import with_defaults


def test_defaults_are_the_default_job():
    config = Config()
    assert (config.agent, config.budget, config.target_kept, config.model) == ("gradient", 200, 0.8, "default")
    assert (config.proxy, config.proxy_form, config.calibration_tokens) == ("mmlu", "answer", 24576)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("agent", "reinforc", "the nearest is reinforce"),
        ("agent", 3, "one of bandit"),
        ("budget", -1, "a whole number from 0 to 10000000, got -1"),
        ("budget", "ten", "got 'ten'"),
        ("budget", True, "got True"),
        ("budget", 1.5, "got 1.5"),
        ("target_kept", 0.0, "above 0 and at most 1, got 0.0"),
        ("target_kept", 1.0001, "got 1.0001"),
        ("target_kept", float("nan"), "got nan"),
        ("granularity", "layer", "one of block, family, site"),
        ("proxy", "mmul", "the nearest is mmlu"),
        ("proxy", "absent.jsonl", "an existing .jsonl file, got 'absent.jsonl'"),
        ("proxy_form", "letters", "the nearest is letter"),
        ("device", "gpu", "auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("device", "cuda:-1", "got 'cuda:-1'"),
        ("device", "cpu\n", "got 'cpu"),
        ("seed", 2**32, "from 0 to 4294967295"),
        ("threads", 0, "from 1 to 1024"),
        ("model", "", "a hub id, a local folder, or default"),
        ("calibration_tokens", 0, "from 512"),
        ("quick", "yes", "true or false"),
        ("calibration", "absent.txt", "an existing file, or the hub id of a data set, got 'absent.txt'"),
        ("calibration", "a/b/c", "got 'a/b/c'"),
        ("calibration", ".", "got '.'"),
        ("device_map", "cuda", "auto, or devices separated by commas, got 'cuda'"),
        ("device_map", "cuda:0,", "got 'cuda:0,'"),
        ("digests", {"a": 1}, "an object of texts"),
        ("policy", "absent", "a folder with policy.json and policy.safetensors in it, such as that of an earlier run"),
    ],
)
def test_a_bad_value_is_one_line_with_field_rule_and_value(field, value, words):
    with pytest.raises(ValueError) as refused:
        Config.of({field: value})
    message = str(refused.value)
    assert message.startswith(f"{field} must be ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"calibration_for_search": True}, "calibration_for_search needs calibration"),
        ({"device_map": "auto", "evaluators": "2"}, "device_map gives all devices to one evaluator"),
    ],
)
def test_fields_that_need_or_exclude_others_say_so(values, message):
    with pytest.raises(ValueError, match=message):
        Config.of(values)


def test_a_calibration_file_is_found_from_anywhere_and_a_hub_id_is_kept(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert Config.of({"calibration": "mine.txt"}).calibration == str(tmp_path / "mine.txt")
    for name in ("somebody/some-data", "ultrachat"):
        assert Config.of({"calibration": name}).calibration == name


def test_an_unknown_field_names_the_nearest_field():
    with pytest.raises(ValueError, match="targte_kept is not a field of the configuration; the nearest is target_kept"):
        Config.of({"targte_kept": 0.5})


def test_the_borders_of_the_ranges_belong_to_them():
    assert Config.of({"target_kept": 1}).target_kept == 1.0
    assert Config.of({"budget": 0, "seed": 2**32 - 1, "threads": 1, "device": "cuda:7"}).budget == 0


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().budget = 3


def test_quick_is_small_and_explicit_values_win():
    quick = Config.of({"quick": True, "report_items": 7})
    assert quick.report_items == 7
    assert {name: getattr(quick, name) for name in QUICK if name != "report_items"} == {
        name: value for name, value in QUICK.items() if name != "report_items"
    }
    assert all(QUICK[name] < getattr(Config(), name) for name in QUICK)


def test_a_jsonl_file_is_a_proxy(tmp_path):
    file = tmp_path / "prüfung 1.jsonl"
    file.write_text("{}\n", encoding="utf-8")
    assert Config.of({"proxy": str(file)}).proxy == str(file)


def test_out_and_resume_must_be_one_folder(tmp_path):
    with pytest.raises(ValueError, match="out and resume name different folders"):
        Config.of({"out": str(tmp_path / "a"), "resume": str(tmp_path / "b")})
    assert Config.of({"out": str(tmp_path), "resume": str(tmp_path / "x" / "..")}).out == str(tmp_path)


def test_heads_are_decided_about_only_where_they_are_cut():
    with pytest.raises(ValueError, match="granularity head needs per_head"):
        Config.of({"granularity": "head"})
    assert Config.of({"granularity": "head", "per_head": True}).granularity == "head"


def test_a_policy_is_found_again_from_another_folder(tmp_path, monkeypatch):
    for name in ("policy.json", "policy.safetensors"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert Config.of({"policy": "."}).definition()["policy"] == str(tmp_path)


def test_json_round_trip_keeps_every_field_but_the_folders(tmp_path):
    config = Config.of({"quick": True, "target_kept": 0.7, "threads": 2, "out": "somewhere"})
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert Config.of(read_fields(path)) == config.model_copy(update={"out": None})


def test_definition_leaves_out_what_a_resumed_run_may_change():
    definition = Config().definition()
    assert {"agent", "target_kept", "model", "proxy", "granularity", "seed", "device"} <= set(definition)
    assert not {"budget", "threads", "out", "resume", "quick"} & set(definition)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"seed": 1, "seed": 2}', "the key 'seed' occurs twice"),
        (b'{"target_kept": NaN}', "NaN is not allowed"),
        (b"[1]", "expected a JSON object, got list"),
        (b"budget = 3", "cannot use the configuration"),
        (b'{"a":' * 100_000, "cannot use the configuration"),
        (b" " * ((1 << 20) + 1), "larger than 1048576 bytes"),
        (b"\xff\xfe", "cannot use the configuration"),
    ],
)
def test_an_unusable_configuration_file_is_refused_in_one_line(tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        read_fields(path)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


def test_an_absent_configuration_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read the configuration"):
        read_fields(tmp_path / "absent.json")


def test_nearest_ignores_case_and_breaks_ties_by_the_alphabet():
    assert nearest("MMLU", PROXIES) == "mmlu"
    assert nearest("zzz", ["b", "a"]) == "a"


def test_every_field_has_a_rule_a_group_and_a_sentence():
    for name, field in Config.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        known = {"rule"} if name in RECORDED else {"rule", "group", "metavar"}
        assert known <= set(field.json_schema_extra), name


def test_names_are_those_of_the_parts_that_carry_them_out():
    import agents
    import envs

    assert sorted(agents.NAMES) == sorted(AGENTS)
    assert set(PROXY_FORMS) == {"answer", "letter"}
    assert sorted(envs.GRANULARITIES) == sorted(GRANULARITIES)


def test_config_json_is_plain_json():
    assert json.loads(Config().to_json())["budget"] == 200


def test_a_local_model_and_proxy_are_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "my model").mkdir()
    (tmp_path / "exam.jsonl").touch()
    (tmp_path / "w.gguf").touch()
    for name in ("default", "mmlu", "random:tiny-llama", "owner"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    config = Config.of({"model": "./my model", "proxy": "exam.jsonl"})
    monkeypatch.chdir("/")
    assert Config.of(json.loads(config.to_json())) == config
    assert (config.model, config.proxy) == (str(tmp_path / "my model"), str(tmp_path / "exam.jsonl"))
    monkeypatch.chdir(tmp_path)
    assert Config.of({"model": "w.gguf"}).model == str(tmp_path / "w.gguf")
    for name in ("default", "random:tiny-llama", "owner/name"):
        assert Config.of({"model": name, "proxy": "mmlu"}).model == name


def test_the_fingerprint_of_an_earlier_version_with_a_relative_path_is_the_same_search(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    stored, given = ({"configuration": {"model": name, "seed": 0}} for name in ("./m", str(tmp_path / "m")))
    assert with_defaults(stored, {}) == given
    assert with_defaults({"configuration": {"model": "gone"}}, {}) != given


@pytest.mark.parametrize("field", ["model", "proxy", "agent", "prior", "policy", "out", "resume", "device"])
def test_bytes_of_another_encoding_in_a_word_of_the_command_line_are_one_line(field):
    with pytest.raises(Refusal, match=f"{field} must be UTF-8 text"):
        Config.of({field: "/tmp/n\udcff"})


def test_a_home_that_does_not_exist_is_one_line():
    with pytest.raises(Refusal, match="model must be"):
        Config.of({"model": "~nobody-of-this-name/m"})


def test_one_of_many_unknown_fields_is_named_and_the_others_are_not_checked():
    with pytest.raises(ValueError, match="buget is not a field of the configuration; the nearest is budget") as refused:
        Config.of({"buget": 1, **{f"key{number}": 0 for number in range(100_000)}})
    assert refused.value.__context__ is None


def test_the_configuration_of_a_model_is_told_from_that_of_a_run(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match="describes a model, not a run: give the folder of a run"):
        read_fields(tmp_path / "hf" / "config.json")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"describes a model, not a run: give its run, {tmp_path}; benchmark, "):
        read_fields(tmp_path / "hf" / "config.json")


@pytest.mark.parametrize("name", ["model", "out", "proxy", "prior"])
def test_a_name_that_is_no_text_is_refused(name):
    # It could not be stored in the configuration of a prior.
    with pytest.raises(ValueError, match=rf"^{name} must be UTF-8 text, got 'caf\\udce9.jsonl'"):
        Config.of({name: "caf\udce9.jsonl"})


def test_a_run_that_recorded_no_form_has_the_one_of_its_time():
    assert Config.of({}).form == "any"
    assert Config.of_run({}, trusted=False).form == "factors"
    assert Config.of_run({"form": "plain"}, trusted=False).form == "plain"
    assert Config.of_run({}, trusted=False).experts == "fused"
    assert Config.of_file({}, trusted=False).form == "any"


@pytest.mark.parametrize(
    ("engine", "form", "export"),
    [("vllm", "plain", "plain"), ("llama.cpp", "plain", "gguf"), ("mlx-lm", "plain", "plain")],
)
def test_an_engine_without_factors_decides_form_and_export(engine, form, export):
    config = Config.of({"serve": engine})
    assert (config.form, config.export) == (form, export)
    assert Config.of({"serve": engine, "export": "none"}).export == "none"
    assert (Config().form, Config().export) == ("any", "hf")


def test_a_size_for_llama_cpp_takes_the_bits_that_its_files_hold():
    config = Config.of({"serve": "llama.cpp", "size": "100MB"})
    assert (config.form, config.export, config.offered_bits, config.scale_group) == ("small", "gguf", (16, 8, 5, 4), 32)
    assert Config.of({"size": "100MB"}).scale_group == 64
    assert Config.of({"size": "100MB"}).offered_bits == (16, 8, 6, 5, 4, 3, 2)
    assert Config.of({"serve": "llama.cpp", "size": "100MB", "matrix_bits": "8,4"}).offered_bits == (8, 4)
    assert Config.of({"serve": "llama.cpp", "form": "plain", "size": "100MB"}).export == "gguf"


@pytest.mark.parametrize(
    ("engine", "export", "bits", "rounds"),
    [("vllm", "compressed-tensors", (16, 8, 4), False), ("mlx-lm", "mlx", (16, 8, 6, 5, 4, 3, 2), True)],
)
def test_a_size_for_an_engine_takes_the_bits_that_it_computes_with(engine, export, bits, rounds):
    config = Config.of({"serve": engine, "size": "100MB"})
    assert (config.form, config.export, config.offered_bits, config.scale_group) == ("small", export, bits, 64)
    assert config.rounds_embedding == rounds
    assert not config.has_factors
    assert Config.of({"serve": engine, "form": "plain", "size": "100MB"}).export == "plain"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"serve": "vllm", "form": "any"}, "serve vllm needs form plain"),
        ({"export": "gguf"}, "export gguf holds no factored matrices; it needs form plain, got any"),
        ({"export": "plain", "form": "factors"}, "export plain holds no factored matrices"),
        ({"serve": "vlm"}, r"serve must be one of transformers, vllm, llama\.cpp"),
    ],
)
def test_what_an_engine_cannot_run_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Config.of(values)


@pytest.mark.parametrize("agent", RETIRED)
def test_the_configuration_of_a_run_by_a_retired_agent_is_still_read_and_the_agent_is_not_made(agent):
    assert Config.of({"agent": agent}).agent == agent
    with pytest.raises(ValueError, match="agent must be one of bandit"):
        agents.find(agent)
