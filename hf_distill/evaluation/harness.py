"""Tasks of EleutherAI's lm-evaluation-harness as benchmarks: by name, or from a YAML file."""

from __future__ import annotations

import copy
import importlib.util
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hf_distill.evaluation.benchmarks import Benchmark, check_positive
from hf_distill.evaluation.bootstrap import ItemScores
from hf_distill.evaluation.classification import check_chance
from hf_distill.evaluation.scoring import STUDENT, TEACHER, Lineup


# How lm-eval makes a value of what the documents got, for the metrics whose value is a function of one mean:
# its name -> the value from the weighted mean.
AGGREGATIONS = {
    "mean": lambda mean: mean,
    "perplexity": lambda mean: math.exp(-mean),
    "weighted_perplexity": lambda mean: math.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}
GUESSED = ("acc", "acc_norm", "acc_bytes")


class LMEvalTask(Benchmark):
    """A task of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), run as its command line runs it.

    Models are paired by document. The chance level of a multiple-choice accuracy is that of answers drawn evenly from
    each document's choices. A group, such as `mmlu`, is measured over the documents of all its tasks together.

    Args:
        task: Name of a task, a tag or a group, or the path of a task's `.yaml` file.
        metric: As lm-eval's tables write it, `acc_norm` or with its filter `exact_match,strict-match`; the task's
            first metric if None.
        num_fewshot: Examples before each document; as the task says if None.
        limit: Only the first so many documents of each task, to try things out.
        batch_size: Requests at once.
        apply_chat_template: Ask through the tokenizer's chat template.
        include_path: Folder with further tasks, found by their names.
        chance: The value that a guess reaches, where it is not to be told from the choices.
        name: How reports call it; the task's name when not given.
        license: Licence of the documents.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: There is no such file; a size is below 1.

    Example:
        ```python
        evaluate_retention(student, teacher, [LMEvalTask("arc_easy", metric="acc_norm")], tokenizer)
        ```
    """

    tasks = frozenset({"causal_lm"})

    def __init__(
        self,
        task: str | Path,
        *,
        metric: str | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        apply_chat_template: bool = False,
        include_path: str | Path | None = None,
        chance: float | None = None,
        name: str | None = None,
        license: str | None = None,
    ) -> None:
        check_positive(limit=limit, batch_size=batch_size)
        self._chance = check_chance(chance)
        self._loaded = _load(str(task), None if include_path is None else str(include_path))
        self.task = str(task)
        first = next(iter(self._loaded.values()))
        self.metric: str = metric or next(iter(first.aggregation()))
        self._key, self._filter = (*self.metric.split(",", 1), "")[:2]
        self._aggregation = _aggregation(self._loaded, self._key)
        self.higher_is_better = bool(first.higher_is_better()[self._key])
        super().__init__(name or (Path(task).stem if _is_file(self.task) else self.task), license)
        self.options = {
            "num_fewshot": num_fewshot,
            "limit": limit,
            "batch_size": batch_size,
            "apply_chat_template": apply_chat_template,
        }

    def check(self, lineup: Lineup) -> None:
        """Check that there is a tokenizer, and every model itself.

        Raises:
            ValueError: One is missing, or the models are no causal language models.
        """
        super().check(lineup)
        lineup.check_text_models(type(self).__name__)

    def score(self, lineup: Lineup) -> dict[str, ItemScores]:
        """Run the task with every model, once for all metrics that are asked of it, and pair the documents.

        Raises:
            ValueError: The models were not given the same documents, or the metric has no such filter.
        """
        found = {role: self._documents(lineup, role) for role in lineup.models}
        order = list(found[TEACHER])
        for role, documents in found.items():
            if documents.keys() != found[TEACHER].keys():
                raise ValueError(
                    f"lm-eval gave {self.metric!r} of {self.name!r} for other documents of the {role} than of the "
                    "teacher, so they cannot be paired; choose another `metric`."
                )
        return {role: _item_scores([documents[key] for key in order]) for role, documents in found.items()}

    def value(self, mean: np.ndarray | float) -> np.ndarray | float:
        """The metric, computed as lm-eval does."""
        compute = AGGREGATIONS[self._aggregation]
        return compute(mean) if isinstance(mean, float) else np.vectorize(compute, otypes=[float])(mean)

    def chance(self, lineup: Lineup) -> float:
        """The mean of one over the number of choices, for accuracies of multiple choice; otherwise 0."""
        if self._chance is not None:
            return self._chance
        multiple = all(task.OUTPUT_TYPE == "multiple_choice" for task in self._loaded.values())
        if not multiple or self._key not in GUESSED:
            return 0.0
        samples = self._samples(lineup, STUDENT)
        choices = [
            len(self._loaded[task].doc_to_choice(sample["doc"])) for task, rows in samples.items() for sample in rows
        ]
        return math.fsum(1 / count for count in choices) / len(choices)

    def _samples(self, lineup: Lineup, role: str) -> Mapping[str, list[dict[str, Any]]]:
        """What lm-eval logs of every document, by task."""
        # Every option but those of the metric: several metrics of one task share a run.
        key = ("lm-eval", role, self.task, tuple(self.options.items()))
        return lineup.once(key, lambda: self._run(lineup, role))

    def _run(self, lineup: Lineup, role: str) -> Mapping[str, list[dict[str, Any]]]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with lineup.running(role) as model:
            tokenizer = copy.deepcopy(lineup.tokenizer)  # lm-eval sets its padding
            batch_size = self.options["batch_size"]
            harness = HFLM(pretrained=_callable(model), tokenizer=tokenizer, batch_size=batch_size)
            # Seeds are those of its command line; the caller's random states are given back by `preserved_state`.
            results = simple_evaluate(
                model=harness,
                tasks=list(self._loaded.values()),
                task_manager=_manager(None, False),  # the tasks are loaded: an index of all others takes seconds
                bootstrap_iters=0,
                log_samples=True,
                **self.options,
            )
        return results["samples"]

    def _documents(self, lineup: Lineup, role: str) -> dict[tuple[str, int, str], Any]:
        """What each document got, by task, number and hash."""
        samples = self._samples(lineup, role)
        filters = list(dict.fromkeys(sample["filter"] for rows in samples.values() for sample in rows))
        wanted = self._filter or filters[0]
        if wanted not in filters:
            raise ValueError(f"`metric` is {self.metric!r}; lm-eval gives the filters {filters}.")
        return {
            (task, sample["doc_id"], sample["doc_hash"]): sample[self._key]
            for task, rows in samples.items()
            for sample in rows
            if sample["filter"] == wanted and self._key in sample
        }


@cache
def _manager(include_path: str | None, defaults: bool) -> Any:
    """lm-eval's index of tasks; that of all its own takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=defaults)


def _load(task: str, include_path: str | None) -> dict[str, Any]:
    """The tasks of a name or a file.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: There is no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("LMEvalTask needs lm-eval, which is not installed: pip install 'hf_distill[lm-eval]'.")
    if _is_file(task) and not os.path.isfile(task):
        raise ValueError(f"`task` is {task!r}, and there is no such file; expected the name or the file of a task.")
    manager = _manager(include_path, not _is_file(task))
    if not _is_file(task) and task not in manager.task_index:
        raise ValueError(
            f"`task` is {task!r}; expected the name of a task that lm-eval has (`lm-eval ls tasks` lists them), or "
            "the path of a .yaml file. Tasks of your own are found with `include_path=folder`."
        )
    return manager.load([os.path.abspath(task) if _is_file(task) else task])["tasks"]


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _aggregation(tasks: Mapping[str, Any], metric: str) -> str:
    """How lm-eval aggregates a metric, the same way in all tasks.

    Raises:
        ValueError: A task does not have the metric, or not as a function of one mean over documents.
    """
    names = set()
    for name, task in tasks.items():
        known = {key: getattr(function, "__name__", "?") for key, function in task.aggregation().items()}
        usable = [key for key, aggregation in known.items() if aggregation in AGGREGATIONS]
        if metric not in usable:
            raise ValueError(
                f"`metric` is {metric!r}; expected one of {usable}, the metrics of {name!r} that are a mean over its "
                "documents, so that they have an interval."
            )
        names.add(known[metric])
    if len(names) > 1:
        raise ValueError(f"The tasks {list(tasks)} aggregate {metric!r} in different ways: {sorted(names)}.")
    return names.pop()


def _item_scores(values: list[Any]) -> ItemScores:
    """Documents' values: a number each, or a pair of a sum and its weight."""
    pairs = np.array([value if isinstance(value, tuple) else (value, 1.0) for value in values], dtype=np.float64)
    return ItemScores(np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1]))


def _callable(model: Any) -> Any:
    """The model as lm-eval takes it: a Hugging Face or PEFT model, without the wrappers of a distributed run."""
    while not hasattr(model, "config"):
        model = model.module
    return model
