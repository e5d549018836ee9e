"""Small files in the official formats of the tasks, written for the tests."""

import json


def glue(folder):
    """SST-2, CoLA, MRPC and STS-B below `folder`/glue."""
    good, poor = ("a fine and funny film", "good , warm and wise"), ("a dull , lifeless mess", "bad in every way")
    rows = [f"{text} {n} \t{label}" for n in range(40) for label, texts in ((1, good), (0, poor)) for text in texts]
    write(folder / "glue/SST-2/train.tsv", "sentence\tlabel", *rows)
    write(folder / "glue/SST-2/dev.tsv", "sentence\tlabel", *rows[:10])
    write(folder / "glue/SST-2/test.tsv", "index\tsentence", "0\tfine film", "1\tdull mess", '2\tit " quotes')
    write(folder / "glue/CoLA/train.tsv", *(f"own{n}\t{n % 2}\t{'*' * (n % 2)}\tA sentence {n}." for n in range(6)))
    write(folder / "glue/CoLA/dev.tsv", "own0\t1\t\tThe boat sank.", "own1\t0\t*\tBoat the sank.")
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    write(
        folder / "glue/MRPC/dev.tsv", "\ufeff" + header, '1\t10\t11\tHe said " yes .\tHe agreed .', "0\t1\t2\tA .\tB ."
    )
    stsb = "index\tgenre\tsentence1\tsentence2\tscore"
    write(folder / "glue/STS-B/train.tsv", stsb, *(f"{n}\town\tA cat {n}.\tA dog.\t{n % 6}" for n in range(12)))
    write(folder / "glue/STS-B/dev.tsv", stsb, "0\town\tA boat.\tA ship.\t4.250", "1\town\tA boat.\tA pea.\t0.5")
    return folder


CONTEXT = "The boat was built in 1817 by Ada Miller. She paid 7 crowns for its two sails, and sold it in Oslo."
QUESTIONS = [
    ("q1", "Who built the boat?", "Ada Miller"),
    ("q2", "How many crowns did she pay?", "7"),  # the first 7 is that of 1817
    ("q3", "Where was it sold?", "Oslo"),
]


def squad(path, questions=QUESTIONS, context=CONTEXT):
    asked = [
        {"id": key, "question": text, "answers": [{"text": answer, "answer_start": context.find(answer)}]}
        for key, text, answer in questions
    ]
    paragraphs = [{"context": context, "qas": asked}]
    write(path, json.dumps({"version": "1.1", "data": [{"title": "Boat", "paragraphs": paragraphs}]}))


def choices(folder):
    """HellaSwag, RACE in both layouts, and BoolQ in both, below `folder`."""
    record = {
        "activity_label": "Sailing",
        "ctx_a": "A boat leaves. [title] The crew",
        "ctx_b": "they",
        "endings": ["set sail [step] at once.", "eat  the sail.", "paint a dog.", "sink."],
        "label": 2,
    }
    shown = {"query": "Sailing: A boat leaves. The crew They", "choices": ["a", "b", "c", "d"], "label": 1}
    write(folder / "hellaswag/hellaswag_val.jsonl", json.dumps(record), json.dumps(shown))
    write(folder / "hellaswag/hellaswag_train.jsonl", *[json.dumps(shown)] * 4)
    passage = {
        "id": "own1.txt",
        "article": "Ada sails. Bo swims.",
        "questions": ["Ada _ .", "What does Bo do?"],
        "options": [["sails", "runs", "eats", "cooks"], ["He flies.", "He swims.", "He sings.", "He sits."]],
        "answers": ["A", "B"],
    }
    write(folder / "race-middle/dev.jsonl", json.dumps(passage))
    write(folder / "official/RACE/dev/middle/2.txt", json.dumps(passage | {"id": "middle2.txt"}))
    write(folder / "official/RACE/dev/middle/10.txt", json.dumps(passage | {"id": "middle10.txt"}, indent=1))
    glued = {"question": "is ada a sailor", "passage": "Ada -- Ada sails.", "idx": 5, "label": True}
    own = {"question": "is ada a sailor", "title": "Ada", "answer": True, "passage": "Ada sails."}
    write(folder / "boolq/dev.jsonl", json.dumps(glued), json.dumps(own))
    return folder


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    return path
