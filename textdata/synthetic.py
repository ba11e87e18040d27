"""
Synthetic stories from a small grammar, to train on where the real TinyStories cannot be downloaded.

A story has 80 to 220 simple words. Each plot is a function that draws its characters and a row of
its table of words, and returns a template. expand_choices then draws one of every [this|or that].
"""

import random
import re
from typing import NamedTuple

from textdata.synthetic_words import (
    ANIMALS,
    BROKEN,
    CHILDREN,
    CLIMBERS,
    COLORS,
    FINDERS,
    HE,
    LOSABLE,
    MISTAKES,
    NAMES,
    NIGHT_NOISES,
    OUTDOORS,
    RAINY_GAMES,
    RESCUES,
    SHARED_TOYS,
    SHE,
    SHY_GAMES,
    SKILLS,
    STUCK,
)

INNERMOST_CHOICE = re.compile(r"\[([^][]*)\]")
# The first is listed twice to be drawn more often.
ONCE = "[Once upon a time,|Once upon a time,|Once]"


class Character(NamedTuple):
    """A person or an animal with a name, a common noun (girl, fox, mom) and pronouns."""

    name: str
    noun: str
    he: str
    him: str
    his: str

    def __str__(self) -> str:
        return self.name

    @property
    def He(self) -> str:
        return upper_first(self.he)


FAMILY = (
    Character("Mom", "mom", *SHE),
    Character("Dad", "dad", *HE),
    Character("Grandma", "grandma", *SHE),
    Character("Grandpa", "grandpa", *HE),
)


def upper_first(text: str) -> str:
    """The text with a capital first letter; the rest is unchanged."""
    return text[0].upper() + text[1:]


def a(noun: str) -> str:
    """The noun after its indefinite article: a fox, an owl."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def somebody(rng: random.Random) -> Character:
    """A child (6 in 10) or an animal with a random name."""
    pronouns = rng.choice((SHE, HE))
    noun = CHILDREN[pronouns] if rng.random() < 0.6 else rng.choice(ANIMALS)
    return Character(rng.choice(NAMES[pronouns]), noun, *pronouns)


def two_friends(rng: random.Random) -> list[Character]:
    """A she and a he with different nouns, in random order, so that no pronoun is ambiguous."""
    nouns = ("girl", "boy") if rng.random() < 0.6 else rng.sample(ANIMALS, 2)
    friends = [
        Character(rng.choice(NAMES[pronouns]), noun, *pronouns)
        for pronouns, noun in zip((SHE, HE), nouns, strict=True)
    ]
    return rng.sample(friends, 2)


def once(hero: Character) -> str:
    """The first sentence about one hero."""
    return f"{ONCE} there [was|lived] a little {hero.noun} named {hero}."


def once_two(one: Character, two: Character) -> str:
    """The first sentence about two friends."""
    friends = f"{a(one.noun)} named {one} and {a(two.noun)} named {two}"
    return f"{ONCE} there [were|lived] two friends, {friends}."


def expand_choices(rng: random.Random, text: str) -> str:
    """Draw one of every [this|or that], inner ones first, and put each paragraph on one line."""
    num_expanded = 1
    while num_expanded:
        text, num_expanded = INNERMOST_CHOICE.subn(
            lambda choice: rng.choice(choice[1].split("|")), text
        )
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def lost_thing(rng: random.Random) -> str:
    """A child loses a thing; an animal that fits the thing finds it."""
    hero = somebody(rng)
    parent = rng.choice(FAMILY)
    nature, finder, offer, spot = rng.choice(FINDERS)
    thing = rng.choice(LOSABLE[nature])
    return f"""
    {once(hero)} {hero.He} had a [pretty|small|new] {thing}. It was a gift from {hero.his}
    {parent.noun}, and {hero.he} took it [everywhere|with {hero.him} every day].

    One [sunny|warm] day, {hero} played in the {rng.choice(OUTDOORS)} until it was time to go home.
    But where was the {thing}? {hero} looked [behind a tree|next to the path]. It was not there.
    {hero.He} looked [near the gate|behind a rock]. It was not there. {hero} [felt very sad|sat down
    and began to cry].

    {upper_first(a(finder))} came by. "I lost my {thing}," said {hero}. "[I looked everywhere.|Can
    you help me?]" The {finder} said, "Do not [cry|worry]. {offer}. [Come with me!|I will help
    you!]"

    They looked and looked. Then the {finder} called, "[Here it is!|Come and look!]" The {thing} was
    {spot}. {hero} [jumped with joy|gave the {finder} a big hug]. "Thank you, [my friend|kind
    {finder}]!" {hero.he} said. That night, {hero} put the {thing} next to {hero.his} bed. [From
    that day on, {hero.he} always took good care of it.|It was good to have it back, and it was good
    to have a new friend.]
    """


def night_noise(rng: random.Random) -> str:
    """A child fears a noise in the night; a parent shows what makes it."""
    hero = somebody(rng)
    parent = rng.choice(FAMILY)
    sound, where, maker, why, deed = rng.choice(NIGHT_NOISES)
    return f"""
    {once(hero)} {hero.He} [liked the day, but {hero.he} was afraid of the dark|was brave in the
    day, but not so brave at night]. One [cold|dark|windy] night, {hero} was in bed when {hero.he}
    heard a noise {where}. "{sound}!" {hero} [pulled the blanket over {hero.his} head|held
    {hero.his} pillow close]. "[Is it a monster?|What if it is a monster?]" {hero.he} thought.
    "{sound}!" went the noise again.

    "{parent}, [please come|come quick]!" called {hero}. "There is a monster {where}!" {parent} came
    in with a [little|small] lamp and [gave {hero} a hug|sat down on the bed]. "Let us [go and
    look|be brave and look] together," {parent.he} said. "A noise is not so scary when you know what
    makes it."

    They went to look. {hero}'s heart beat fast. But there was no monster at all! It was only
    {maker}. {why}. {hero} began to laugh. "[You are not scary|You are no monster]!" {hero.he} said,
    and {hero.he} {deed}.

    Then {hero} went back to bed. [{parent} gave {hero.him} a kiss, and {hero.he} slept all
    night.|From that night on, {hero.he} was not afraid of the dark.]
    """


def quarrel(rng: random.Random) -> str:
    """Two friends fight over a toy; an older animal teaches them to share."""
    one, two = two_friends(rng)
    toy, advice, fun = rng.choice(SHARED_TOYS)
    elder = rng.choice(("old owl", "old turtle", "kind duck", "big dog"))
    return f"""
    {once_two(one, two)} One day, they [saw|found] {a(rng.choice(COLORS))} {toy} in the
    {rng.choice(OUTDOORS)}.

    "[I saw it first|It is mine]!" said {one}. "[I want it.|You cannot have it.]" But {two} said,
    "No, it is mine!" They [pushed and pulled|shouted and pushed]. Soon they were both angry. {one}
    sat down under a tree, and {two} sat down [on a rock|next to the path]. Nobody played with the
    {toy}. It was no fun.

    {upper_first(a(elder))} came by. "Why are you so sad?" asked the {elder}. "We both want the
    {toy}," said {two}, "but there is only one." The {elder} [smiled|thought and thought].
    "{advice}," said the {elder}. "[Then you can both have fun.|Two can have more fun than one.]"

    {one} looked at {two}. "I am sorry," said {one}. "[You are my friend.|You can go first.]" {two}
    said, "I am sorry, too." They {fun}. They [laughed and laughed|had so much fun].

    At last, they [thanked the {elder}|went home as friends]. [{one} and {two} learned that it is
    more fun to share.|From that day on, they always shared.|A toy is good, but a friend is better.]
    """


def stuck_in_tree(rng: random.Random) -> str:
    """A thing is stuck in a tree; an animal that climbs or flies gets it down."""
    hero = somebody(rng)
    thing, ascent, descent = rng.choice(STUCK)
    climber, talent, climb, food = rng.choice(CLIMBERS)
    return f"""
    One [day|sunny day|windy morning], a little {hero.noun} named {hero} went to the
    {rng.choice(OUTDOORS)} with {a(rng.choice(COLORS))} {thing}. It was [new|a gift], and {hero.he}
    loved it. {hero.He} [ran and laughed|played and sang]. Then {ascent}, and it was stuck in a tall
    tree!

    "Oh no!" said {hero}. "[How can I get it back?|My {thing} is stuck!]" {hero.He} jumped as high
    as {hero.he} could, but the {thing} was too high. {hero.He} [shook the tree|tried with a long
    stick], but the {thing} did not come down. {hero} [sat down and cried|was very sad].

    {upper_first(a(climber))} heard {hero.him}. "What is wrong?" asked the {climber}. "My {thing} is
    stuck, and [the tree is too tall for me|I cannot get it down]," said {hero}. "{talent}," said
    the {climber}. "[Let me help you!|I will get it for you!]" The {climber} {climb}, {descent}.
    {hero} [jumped with joy|laughed and danced]. "Thank you, {climber}! [You are so kind.|You are a
    good friend.]"

    The next day, {hero} came back with some {food} for the {climber}. [They ate and played
    together.|From that day on, they were friends.] It is good to [ask for help|have friends who
    help].
    """


def broken_thing(rng: random.Random) -> str:
    """A child breaks a thing; somebody of the family mends it."""
    hero = somebody(rng)
    helper = rng.choice(FAMILY)
    thing, mishap, tools, mending, use = rng.choice(BROKEN)
    return f"""
    {once(hero)} {hero.He} had a [small|pretty] {rng.choice(COLORS)} {thing}. {hero.He} [loved it
    more than all {hero.his} other things|had wanted one for a long time].

    One [day|morning], {hero} {mishap}. "Oh no! I broke it!" said {hero}. {hero.He} tried to fix it,
    but {hero.he} [was too little|did not know how]. {hero} [began to cry|felt very sad].

    Then {hero.his} {helper.noun} heard {hero.him} and came in. "What happened?" asked {helper}. "I
    broke my {thing}," said {hero}. "[It is all my fault.|I am so sad.]" {helper} [gave {hero.him} a
    hug|smiled]. "We do not have to throw it away," {helper.he} said. "[I know what to do.|We can
    fix it together.]" {helper} came back with {tools}. {hero} held the {thing} [very still|with
    care], and {helper} {mending}. "[There!|All done!]" said {helper}. "It is as good as new."

    {hero} {use}. It was [as good as before|not broken now]! "Thank you, {helper}!" {hero.he} said.
    [From that day on, {hero} took good care of the {thing}.|{hero} learned that many broken things
    can be fixed.]
    """


def rainy_day(rng: random.Random) -> str:
    """It rains; somebody of the family invents a game for inside."""
    hero = somebody(rng)
    helper = rng.choice(FAMILY)
    idea, needs, making, fun = rng.choice(RAINY_GAMES)
    return f"""
    One [day|morning], a little {hero.noun} named {hero} sat by the window. {hero.He} wanted to
    [play in the {rng.choice(OUTDOORS)}|ride {hero.his} bike|play outside]. But it was raining and
    raining. {hero} waited, but the rain did not stop. "[I do not like the rain|There is nothing to
    do]!" {hero} told {helper}.

    {helper} smiled. "[We can have fun inside, too|A rainy day can be fun, too]," {helper.he} said.
    "Let us {idea}!" {hero} [jumped up|began to smile]. They [got|found] {needs}. They {making}.
    Then they {fun}. They had so much fun that {hero} [did not think of the rain at all|did not hear
    the rain].

    After a [long time|while], {helper} said, "Look! The rain has stopped!" [There was a big rainbow
    in the sky.|The sun was out, and there were puddles everywhere.] "Hooray!" said {hero}. "But can
    we {idea} again when it rains?" {helper} laughed and said, "Of course we can." [From that day
    on, {hero} was not sad when it rained.|{hero} learned that a rainy day can be a good day.|{hero}
    gave {helper} a big hug.]
    """


def shy_friend(rng: random.Random) -> str:
    """A shy neighbor hides; a patient child makes friends."""
    hero, friend = two_friends(rng)
    move, answer, game = rng.choice(SHY_GAMES)
    parent = rng.choice(FAMILY)
    hiding = rng.choice(("tree", "bush", "fence", "rock"))
    return f"""
    {once(hero)} {hero.He} [had nobody to play with|wanted to have a friend]. One day, a new
    {friend.noun} came to live [next door|near {hero.him}]. {hero} ran outside to say hello.

    But the new {friend.noun} was shy and hid behind a {hiding}. "Hello! I am {hero}," said {hero}.
    "[Do you want to play?|Will you come out?]" Nobody came out. {hero} [felt sad|did not know what
    to do]. {hero.He} asked {hero.his} {parent.noun}, "[Why does {friend.he} hide?|Does {friend.he}
    not like me?]" {parent} said, "{friend.He} is new here, and it is all so strange. [Be kind and
    wait.|Give {friend.him} time.]"

    So {hero} went back to the {hiding} and {move}. Then {hero.he} waited. [Soon|After a while],
    {answer}! {hero} [laughed|smiled]. Then the new {friend.noun} [looked|came] out from behind the
    {hiding}. "[Hello|Hi]," {friend.he} said in a [small|tiny] voice. "I am {friend}. [I was
    scared.|I did not know what to say.]" {hero} said, "[I am so glad that you came out.|That is all
    right. I get scared, too.]"

    {hero} and {friend} {game} until the sun went down. [From that day on, they were
    friends.|{friend} was not shy any more, and {hero} was not alone any more.|A friend is worth
    waiting for.]
    """


def small_rescue(rng: random.Random) -> str:
    """Two friends help a small animal in trouble."""
    hero, friend = two_friends(rng)
    small, trouble, tool, rescue, thanks = rng.choice(RESCUES)
    return f"""
    {once_two(hero, friend)} They [loved to run and play|went for a walk every day]. One
    [day|morning], {hero} stopped. "[Wait! I hear a small voice|Look! I see something small],"
    {hero.he} said.

    It was a little {small}. The {small} {trouble}. "[Help!|Please help me!]" it said [in a tiny
    voice|again and again]. "It is only {a(small)}," said {friend}. "[Come and play!|Let us go!]"
    But {hero} did not go. "It is small, but it is [scared|all alone]," {hero.he} said. "[We are
    big, so we can help.|We must help.]"

    {friend} [thought about it|looked at the {small}]. "You are right," {friend.he} said. "[What can
    we do?|I want to help, too.]" They looked around, and {friend} found {tool}. "[We can use
    this!|This is just right!]" said {friend}. With great care, {hero} {rescue}.

    "Thank you!" said the {small}, and it {thanks}. {hero} and {friend} were [glad|happy]. [After
    that, the {small} was their friend.|"I am glad that we stopped," said {friend}.] [They learned
    that nobody is too small to be helped.|It does not take long to be kind.|They never forgot that
    day.]
    """


def mistake(rng: random.Random) -> str:
    """A child spoils something, hides, confesses and is forgiven."""
    hero = somebody(rng)
    parent = rng.choice(FAMILY)
    fun, mishap, spoiled, repair = rng.choice(MISTAKES)
    return f"""
    {once(hero)} One [day|morning], {hero} {fun}. {hero.He} knew that {hero.his} {parent.noun} would
    not like it, but it was hard to stop. {mishap}!

    "Oh no!" said {hero}. "What will {parent} say?" {hero.He} [ran away and hid behind the door|hid
    under the table]. Soon {parent} came home. "[What happened to|Who did this to] the {spoiled}?"
    asked {parent}. {hero} did not [say a word|make a sound].

    But {hero} [felt bad inside|had a bad feeling in {hero.his} tummy]. {hero.He} did not want to
    [play|eat]. At last, {hero.he} went to {parent}. "It was me," said {hero}. "I am [so|very]
    sorry."

    {parent} gave {hero.him} a [big|long] hug. "I am sad about the {spoiled}," said {parent}, "but I
    am [glad|proud] that you told me the truth. [Everybody makes mistakes.|That was very brave.] We
    can make it good again." Together, they {repair}.

    {hero} [felt happy again|felt much better]. [{hero.He} learned that it is good to tell the
    truth.|From that day on, {hero} always told the truth.|That night, {hero} slept very well.]
    """


def learning(rng: random.Random) -> str:
    """A child fails twice, gets a tip from a friend and succeeds."""
    hero, friend = two_friends(rng)
    skill, failure, second_failure, tip, success = rng.choice(SKILLS)
    return f"""
    {once(hero)} {hero.He} had a [good|best] friend, {a(friend.noun)} named {friend}. {friend} could
    {skill}, but {hero} could not. "[I want to {skill}, too|I wish I could {skill}]," said {hero}.

    One [day|sunny day|morning], {hero} tried to {skill}. {failure}. {hero.He} tried again.
    {second_failure}. {hero} was [sad|angry|tired]. "I cannot do it!" {hero.he} said.

    {friend} [sat down next to {hero.him}|came to {hero.him}]. "It was hard for me, too," said
    {friend}. "I tried [many, many times|again and again]. [Do not give up!|You can do it!] {tip}."
    {hero} [thought about it|took a deep breath]. "I will try [one more time|again]," {hero.he}
    said.

    {hero} did what {friend} had said. The first time, it was [a bit better|almost right]. The next
    time, {hero} did it! {success}! "[Look at me!|I did it!] I can {skill}!" {hero.he} [shouted|said
    with a big smile]. {friend} [clapped|jumped with joy].

    [{hero} and {friend} were so happy that they danced.|That night, {hero} told {hero.his}
    {rng.choice(FAMILY).noun} all about it.] [{hero} learned that you must try and try again.|It is
    good to try, and it is good to have a friend.|Hard things get easy when you do not give up.]
    """


PLOTS = (
    lost_thing,
    night_noise,
    quarrel,
    stuck_in_tree,
    broken_thing,
    rainy_day,
    shy_friend,
    small_rescue,
    mistake,
    learning,
)


def story(rng: random.Random) -> str:
    """A synthetic story, drawn from rng: a plot, its characters and words, then the choices."""
    plot = rng.choice(PLOTS)
    return expand_choices(rng, plot(rng))
