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
EVAL_ROWS = 270         # the same number of every label
EVAL_SHARE = 0.15       # of a chapter's categories
EVAL_CATEGORY_ROWS = 6  # evaluation rows from one category at most

# Number of the chapter in the tabular list -> its name here: one common word each, which is one token for most models.
CHAPTERS = {
    2: "Cancer",     # neoplasms
    5: "Mental",     # mental, behavioural and neurodevelopmental disorders
    6: "Brain",      # nervous system
    7: "Eye",        # eye and adnexa
    9: "Heart",      # circulatory system
    12: "Skin",      # skin and subcutaneous tissue
    13: "Bone",      # musculoskeletal system and connective tissue
    15: "Birth",     # pregnancy, childbirth and the puerperium
    20: "External",  # external causes of morbidity
}

# Each hospital's specialties: its share of a chapter's rows is its weight over the sum of the weights in that column.
HOSPITALS = {
    "a": {"Cancer": 3, "Heart": 4, "Brain": 2, "Bone": 2, "External": 1},              # university hospital
    "b": {"Bone": 2, "External": 3, "Skin": 2, "Brain": 2, "Heart": 1, "Cancer": 1},   # trauma and orthopaedics
    "c": {"Birth": 4, "Mental": 2, "Skin": 2, "Eye": 2, "Cancer": 2},                  # women and children
    "d": {"Eye": 3, "Skin": 3, "Cancer": 2, "Heart": 2, "External": 1},                # eye and skin
    "e": {"Mental": 4, "Brain": 3, "Birth": 2, "Bone": 1, "Eye": 2, "Heart": 1},       # psychiatry and neurology
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
