#!/usr/bin/env python3
"""Makes the demo's data: ICD-10-CM diagnosis text -> chapter, spread over five hospitals with their own specialties.

    scripts/demo-data.py ICD_XML OUTPUT_FOLDER

Writes site-a.jsonl ... site-e.jsonl, eval.jsonl and split.json, and prints the SHA-256 of each. Public codes, not patients.
The texts are the titles and inclusion terms of the tabular list. A three-character category is either in training or
in the evaluation, for all hospitals at once, so near duplicates ("... right eye" / "... left eye") never straddle the two.
Every choice hangs on SHA-256 of SEED and the text: the same XML gives the same bytes on any machine.
"""

import hashlib
import json
import os
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree

SEED = "consilium demo 1"
PROMPT = "Chapter of: %s"
CHARS_MAX = 64          # longer texts cost the CPU trainer more than they teach
LABEL_ROWS_MAX = 3500   # training rows of one chapter: keeps joints and bones from outnumbering all others
EVAL_ROWS = 288         # the same number of every label
EVAL_SHARE = 0.15       # of a chapter's categories
EVAL_CATEGORY_ROWS = 6  # evaluation rows from one category at most

# Number of the chapter in the tabular list -> its name here: one common word each, which is one token for most models.
CHAPTERS = {
    1: "infection",  # certain infectious and parasitic diseases
    2: "cancer",     # neoplasms
    5: "mental",     # mental, behavioural and neurodevelopmental disorders
    6: "brain",      # nervous system
    7: "eye",        # eye and adnexa
    8: "ear",        # ear and mastoid process
    9: "heart",      # circulatory system
    10: "lung",      # respiratory system
    11: "gut",       # digestive system
    12: "skin",      # skin and subcutaneous tissue
    13: "bone",      # musculoskeletal system and connective tissue
    15: "birth",     # pregnancy, childbirth and the puerperium
}

# Each hospital's specialties: its share of a chapter's rows is its weight over the sum of the weights in that column.
HOSPITALS = {
    "a": {"cancer": 4, "heart": 3, "gut": 3, "infection": 3, "lung": 2, "brain": 1, "birth": 1},  # university hospital
    "b": {"bone": 3, "skin": 2, "infection": 2, "heart": 2, "cancer": 2, "brain": 2, "ear": 1},   # trauma and orthopaedics
    "c": {"birth": 4, "infection": 3, "gut": 2, "lung": 2, "skin": 2, "ear": 2, "mental": 1},     # women and children
    "d": {"eye": 3, "ear": 3, "skin": 3, "cancer": 2, "brain": 2, "infection": 1, "heart": 1},    # eye, ear and skin
    "e": {"mental": 4, "brain": 3, "bone": 1, "eye": 2, "heart": 2, "lung": 2, "gut": 2},         # psychiatry and neurology
}


def draw(*parts):
    """A number in [0, 1) that depends on nothing but SEED and the parts."""
    digest = hashlib.sha256("\x1f".join((SEED,) + parts).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56


def texts_of(diagnosis):
    """The title and the inclusion terms of a code and of all codes below it."""
    yield diagnosis.findtext("desc")
    for note in diagnosis.findall("inclusionTerm/note"):
        yield "".join(note.itertext())
    for child in diagnosis.findall("diag"):
        yield from texts_of(child)


def read_rows(path):
    """[(label, category, text)]: each text once; texts that occur in several categories are left out."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as failure:
        sys.exit("demo-data.py: cannot read the tabular list %s: %s" % (path, failure))
    places = {}
    for chapter in root.findall("chapter"):
        label = CHAPTERS.get(int(chapter.findtext("name")))
        for category in chapter.findall("section/diag"):
            for raw in texts_of(category):
                text = " ".join(unicodedata.normalize("NFC", raw or "").split())
                if text:
                    places.setdefault(text.casefold(), []).append((label, category.findtext("name"), text))
    rows = []
    for found in places.values():
        label, category, text = found[0]
        if label and len(text) <= CHARS_MAX and all(other[1] == category for other in found):
            rows.append((label, category, text))
    missing = sorted(set(CHAPTERS.values()) - {row[0] for row in rows})
    if missing:
        sys.exit("demo-data.py: %s has no rows for: %s; is it icd10c-tabular*.xml?" % (path, ", ".join(missing)))
    return rows


def split_categories(rows):
    """category -> "train" or "eval": of each chapter the EVAL_SHARE of its categories that draw the lowest numbers."""
    sides = {}
    for label in CHAPTERS.values():
        names = sorted({row[1] for row in rows if row[0] == label}, key=lambda name: draw("category", name))
        for position, name in enumerate(names):
            sides[name] = "eval" if position < EVAL_SHARE * len(names) else "train"
    return sides


def evaluation(rows):
    """EVAL_ROWS rows, equally many of each label, at most EVAL_CATEGORY_ROWS from one category."""
    chosen = []
    for label in CHAPTERS.values():
        taken, of_category = [], {}
        for row in sorted((row for row in rows if row[0] == label), key=lambda row: draw("eval", row[2])):
            if of_category.get(row[1], 0) < EVAL_CATEGORY_ROWS and len(taken) < EVAL_ROWS // len(CHAPTERS):
                of_category[row[1]] = of_category.get(row[1], 0) + 1
                taken.append(row)
        chosen += taken
    return sorted(chosen, key=lambda row: draw("order", row[2]))


def hospital_of(label, text):
    """The hospital that holds this row."""
    weights = [(name, mix[label]) for name, mix in HOSPITALS.items() if label in mix]
    point = draw("hospital", text) * sum(weight for _, weight in weights)
    for name, weight in weights:
        point -= weight
        if point < 0:
            return name
    return weights[-1][0]


def write(folder, name, content):
    path = os.path.join(folder, name)
    with open(path + ".part", "wb") as file:
        file.write(content)
    os.replace(path + ".part", path)
    print("%s  %s" % (hashlib.sha256(content).hexdigest(), name))


def jsonl(rows):
    lines = [json.dumps({"messages": [{"role": "user", "content": PROMPT % text}, {"role": "assistant", "content": label}]},
                        ensure_ascii=False) for label, _, text in rows]
    return ("\n".join(lines) + "\n").encode()


def counts(rows):
    return {label: sum(1 for row in rows if row[0] == label) for label in CHAPTERS.values()}


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: demo-data.py ICD_XML OUTPUT_FOLDER")
    xml, folder = sys.argv[1:]
    rows = read_rows(xml)
    sides = split_categories(rows)
    training = []
    for label in CHAPTERS.values():
        of_label = [row for row in rows if row[0] == label and sides[row[1]] == "train"]
        training += sorted(of_label, key=lambda row: draw("train", row[2]))[:LABEL_ROWS_MAX]
    training.sort(key=lambda row: draw("order", row[2]))
    held_out = evaluation([row for row in rows if sides[row[1]] == "eval"])

    os.makedirs(folder, exist_ok=True)
    split = {"seed": SEED, "eval": {"rows": len(held_out), "labels": counts(held_out)}, "sites": {}}
    for name in HOSPITALS:
        held = [row for row in training if hospital_of(row[0], row[2]) == name]
        split["sites"]["site-" + name] = {"rows": len(held), "labels": counts(held)}
        write(folder, "site-%s.jsonl" % name, jsonl(held))
    write(folder, "eval.jsonl", jsonl(held_out))
    split["categories"] = dict(sorted(sides.items()))
    write(folder, "split.json", (json.dumps(split, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
