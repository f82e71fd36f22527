"""Data sets as they are downloaded, with a few rows: the layouts of the paper's tasks."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

QUOTED = '"Not so," he said'  # a quote that never closes

#: Folder, header, and the rows of each file, of GLUE's official download.
GLUE = {
    "CoLA": (
        None,
        [["gj04", "1", "", "They drank the pub."], ["gj04", "0", "*", "Drank they."]],
    ),
    "SST-2": (
        ["sentence", "label"],
        [["hide new secretions ", "0"], ['contains " wit ', "1"]],
    ),
    "MRPC": (
        ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        [["1", "7", "8", QUOTED, "He denied it."], ["0", "9", "5", "A b.", "C d."]],
    ),
    "QQP": (
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        [["3", "1", "2", "How?", 'How "so?', "1"], ["4", "5", "6", "Why?", "", "0"]],
    ),
    "QNLI": (
        ["index", "question", "sentence", "label"],
        [
            ["0", "Who came?", "The king came.", "entailment"],
            ["1", "When?", QUOTED, "not_entailment"],
        ],
    ),
    "RTE": (
        ["index", "sentence1", "sentence2", "label"],
        [
            ["0", "No weapons were found.", "Weapons found.", "not_entailment"],
            ["1", QUOTED, "He spoke.", "entailment"],
        ],
    ),
    "MNLI": (
        ["index", "promptID", "pairID", "genre", "sentence1_binary_parse",
         "sentence2_binary_parse", "sentence1_parse", "sentence2_parse", "sentence1",
         "sentence2", "label1", "gold_label"],
        [
            ["0", "31", "31n", "fiction", "( a )", "( b )", "(S a)", "(S b)", QUOTED,
             "He spoke.", "neutral", "entailment"],
            ["1", "32", "32c", "letters", "( a )", "( b )", "(S a)", "(S b)", "A is.",
             "A is not.", "neutral", "contradiction"],
            ["2", "33", "33e", "slate", "( a )", "( b )", "(S a)", "(S b)", "A is.",
             "B is.", "neutral", "neutral"],
        ],
    ),
    "STS-B": (
        ["index", "genre", "filename", "year", "old_index", "source1", "source2",
         "sentence1", "sentence2", "score"],
        [
            ["0", "main-captions", "MSRvid", "2012test", "0001", "none", "none",
             "A plane is taking off.", "An air plane is taking off.", "5.000"],
            ["1", "main-news", "MSRpar", "2012test", "0004", "none", "none", QUOTED,
             "He denied it.", "1.25"],
        ],
    ),
}  # fmt: skip
#: Files of a task that are not train and dev.
GLUE_FILES = {"MNLI": ("train", "dev_matched", "dev_mismatched")}


def write_glue(home: Path, name: str, times: int = 1) -> Path:
    """Write a folder of GLUE's download, and return it."""
    header, rows = GLUE[name]
    folder = home / name
    folder.mkdir(parents=True)
    for split in GLUE_FILES.get(name, ("train", "dev")):
        lines = [*([header] if header else []), *rows * times]
        text = "".join("\t".join(line) + "\n" for line in lines)
        # MRPC's files begin with a byte-order mark.
        encoding = "utf-8-sig" if name == "MRPC" else "utf-8"
        (folder / f"{split}.tsv").write_text(text, encoding=encoding)
    # Test sets have no labels, and one more column of numbers.
    (folder / "test.tsv").write_text("index\tsentence\n0\tUnknown.\n")
    return folder


def write_e2e(folder: Path, times: int = 1) -> Path:
    """Write the E2E challenge's files."""
    folder.mkdir(parents=True)
    rows = [
        [
            "name[Blue Spice], eatType[coffee shop]",
            'Blue Spice, a "coffee shop", is here.',
        ],
        ["name[Blue Spice], eatType[coffee shop]", "A coffee shop: Blue Spice."],
        ["name[Zizzi], area[riverside]", "Zizzi is by the river."],
    ]
    for name in ("trainset", "devset", "testset_w_refs"):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(
                [["mr", "ref"], *rows * times]
            )
    (folder / "testset.csv").write_text('"MR"\n"name[Zizzi]"\n')
    return folder


def instruction_task(name: str, instances: int = 3, long: int = 1) -> dict:
    """A task of Super-NaturalInstructions."""
    return {
        "Contributors": ["Somebody"],
        "Categories": ["Question Answering"],
        "Definition": [f"Answer the question of {name}"],
        "Positive Examples": [
            {"input": f"Is {n}? " * long, "output": f"yes {n}", "explanation": "It is."}
            for n in ("a", "b", "c")
        ],
        "Negative Examples": [{"input": "No", "output": "no", "explanation": "No."}],
        "Instances": [
            {"id": f"{name}-{n}", "input": f"Is {n}?", "output": [f"{n}", f"yes {n}"]}
            for n in range(instances)
        ],
    }


def write_instructions(folder: Path, instances: int = 3, long: int = 1) -> Path:
    """Write a folder like the repository of natural-instructions."""
    splits = {"train": ["task001_one", "task002_two"], "test": ["task003_three"]}
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    (folder / "README.md").write_text("Tasks\n")
    for split, names in splits.items():
        (folder / f"splits/default/{split}_tasks.txt").write_text(
            "\n".join(names) + "\n"
        )
        for name in names:
            text = json.dumps(instruction_task(name, instances, long), indent=4)
            (folder / "tasks" / f"{name}.json").write_text(text)
    return folder


def message(number: int, parent: int | None, role: str, text: str, **fields) -> dict:
    """A message of OASST1."""
    base = {"message_id": f"m{number}", "role": role, "text": text, "lang": "en"}
    parts = {"parent_id": None if parent is None else f"m{parent}", "deleted": False}
    return base | parts | {"review_result": True, "rank": None} | fields


#: A tree: m1 has two replies of which the second is better; it goes on from there.
MESSAGES = [
    message(1, None, "prompter", "Who are you?"),
    message(2, 1, "assistant", "Nobody.", rank=1),
    message(3, 1, "assistant", "An assistant.", rank=0),
    message(4, 3, "prompter", "Whose?"),
    message(5, 4, "assistant", "Yours."),
    message(6, 3, "prompter", "Really?"),
    message(7, 6, "assistant", "Rude", rank=0, deleted=True),
    message(8, 6, "assistant", "Yes.", rank=1),
    message(9, 5, "prompter", "Unanswered?"),
]


def write_oasst(path: Path, *, trees: bool = False, times: int = 1) -> Path:
    """Write OASST1's messages, flat or as trees, compressed where the name says so."""

    def tree(number: int) -> dict:
        record = next(m for m in MESSAGES if m["message_id"] == f"m{number}")
        replies = [m for m in MESSAGES if m["parent_id"] == record["message_id"]]
        inner = [tree(int(reply["message_id"][1:])) for reply in replies]
        return {k: v for k, v in record.items() if v is not None} | {"replies": inner}

    def renamed(record: dict, copy: int) -> dict:
        ids = {
            k: f"{record[k]}-{copy}"
            for k in ("message_id", "parent_id")
            if record.get(k)
        }
        inner = {"replies": [renamed(r, copy) for r in record.get("replies", [])]}
        return record | ids | (inner if "replies" in record else {})

    rows = []
    for copy in range(times):
        if trees:
            prompt = renamed(tree(1), copy)
            state = {
                "message_tree_id": prompt["message_id"],
                "tree_state": "ready_for_export",
            }
            rows.append(state | {"prompt": prompt})
        else:
            rows += [renamed(record, copy) for record in MESSAGES]
    text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_metamath(path: Path, times: int = 1) -> Path:
    """Write MetaMathQA's file."""
    rows = [
        {
            "type": "MATH_AnsAug",
            "query": f"What is {n} + {n}?",
            "original_question": "What is 1 + 1?",
            "response": f"{n} + {n} = {2 * n}\n#### {2 * n}\nThe answer is: {2 * n}",
        }
        for n in range(1, 4)
    ]
    path.write_text(json.dumps(rows * times, indent=4))
    return path


def write_gsm8k(folder: Path, times: int = 1) -> Path:
    """Write GSM8K as the hub has it."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(parents=True)
    rows = [
        {"question": "What is 2 + 2?", "answer": "It is <<2+2=4>>4.\n#### 4"}
    ] * times
    for split in ("train", "test"):
        table = pa.Table.from_pylist(rows)
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder
