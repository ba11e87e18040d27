"""Synthetic stories: a small grammar of our own, for when the real TinyStories cannot be had.

`story(rng)` tells one story of some 90 to 200 small words. Each plot below is a function: it casts the
characters, draws things that fit together from the table above it, and hands the text to `tell`, which
settles every `[this|or that]` in it.
"""

import random
import re
from typing import NamedTuple


class Character(NamedTuple):
    name: str
    kind: str
    he: str
    him: str
    his: str

    def __str__(self):
        return self.name

    @property
    def He(self):
        return upper_first(self.he)


SHE = ("she", "her", "her")
HE = ("he", "him", "his")
NAMES = {
    SHE: (
        "Lily",
        "Mia",
        "Anna",
        "Sue",
        "Amy",
        "Lucy",
        "Emma",
        "Zoe",
        "Rose",
        "Kate",
        "Dot",
        "Ella",
        "Nora",
    ),
    HE: (
        "Tom",
        "Ben",
        "Max",
        "Tim",
        "Sam",
        "Jack",
        "Leo",
        "Dan",
        "Finn",
        "Bob",
        "Pip",
        "Toby",
        "Noah",
    ),
}
CHILDREN = {SHE: "girl", HE: "boy"}
# None of these flies, swims well or eats a friend, so each of them fits every plot.
ANIMALS = ("rabbit", "bear", "fox", "pig", "goat", "panda", "lamb")
FAMILY = (
    Character("Mom", "mom", *SHE),
    Character("Dad", "dad", *HE),
    Character("Grandma", "grandma", *SHE),
    Character("Grandpa", "grandpa", *HE),
)
COLORS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "white")
# The first is there twice to be told more often.
ONCE = "[Once upon a time,|Once upon a time,|Once]"
PLACES = ("park", "garden", "yard", "meadow", "field")


def upper_first(text):
    return text[0].upper() + text[1:]


def a(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def somebody(rng):
    pronouns = rng.choice((SHE, HE))
    kind = CHILDREN[pronouns] if rng.random() < 0.6 else rng.choice(ANIMALS)
    return Character(rng.choice(NAMES[pronouns]), kind, *pronouns)


def two_friends(rng):
    """A she and a he of different kinds, so that no pronoun is ever in doubt."""
    kinds = ("girl", "boy") if rng.random() < 0.6 else rng.sample(ANIMALS, 2)
    friends = [
        Character(rng.choice(NAMES[who]), kind, *who)
        for who, kind in zip((SHE, HE), kinds, strict=True)
    ]
    return rng.sample(friends, 2)


def once(hero):
    return f"{ONCE} there [was|lived] a little {hero.kind} named {hero}."


def once_two(one, two):
    return f"{ONCE} there [were|lived] two friends, {a(one.kind)} named {one} and {a(two.kind)} named {two}."


INNERMOST_CHOICE = re.compile(r"\[([^][]*)\]")


def tell(rng, text):
    """Settle every [choice|in the text], inner ones first, and put each paragraph on one line."""
    settled = 1
    while settled:
        text, settled = INNERMOST_CHOICE.subn(lambda choice: rng.choice(choice[1].split("|")), text)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


# The nature of a thing decides where it can get lost, and so who can find it.
LOSABLE = {
    "rolling": ("ball", "toy car", "marble"),
    "soft": ("teddy bear", "hat", "blanket", "scarf"),
    "shiny": ("bell", "key", "coin"),
}
FINDERS = (  # nature, finder, offer, where it was
    (
        "rolling",
        "mouse",
        "I am small, so I can look under things",
        "under a bench. It had rolled there",
    ),
    (
        "rolling",
        "duck",
        "I live in the tall grass, so I can look there",
        "in the grass. It had rolled there",
    ),
    (
        "soft",
        "dog",
        "My nose is good, so I can smell it",
        "behind a bush. A puppy had taken it there",
    ),
    (
        "soft",
        "hen",
        "I saw something soft near my house",
        "in the hay. A baby chick was sleeping on it",
    ),
    (
        "shiny",
        "owl",
        "My eyes are good, so I can see it shine",
        "under a leaf. It was shining in the sun",
    ),
    (
        "shiny",
        "frog",
        "I can swim, so I can look in the water",
        "in the pond. It was shining in the water",
    ),
)


def lost_thing(rng):
    hero, parent = somebody(rng), rng.choice(FAMILY)
    nature, kind, offer, spot = rng.choice(FINDERS)
    thing = rng.choice(LOSABLE[nature])
    return tell(
        rng,
        f"""
    {once(hero)} {hero.He} had a [pretty|small|new] {thing}. It was a gift from {hero.his} {parent.kind}, and
    {hero.he} took it [everywhere|with {hero.him} every day].

    One [sunny|warm] day, {hero} played in the {rng.choice(PLACES)} until it was time to go home. But where
    was the {thing}? {hero} looked [behind a tree|next to the path]. It was not there. {hero.He} looked [near
    the gate|behind a rock]. It was not there. {hero} [felt very sad|sat down and began to cry].

    {upper_first(a(kind))} came by. "I lost my {thing}," said {hero}. "[I looked everywhere.|Can you help
    me?]" The {kind} said, "Do not [cry|worry]. {offer}. [Come with me!|I will help you!]"

    They looked and looked. Then the {kind} called, "[Here it is!|Come and look!]" The {thing} was {spot}.
    {hero} [jumped with joy|gave the {kind} a big hug]. "Thank you, [my friend|kind {kind}]!" {hero.he} said.
    That night, {hero} put the {thing} next to {hero.his} bed. [From that day on, {hero.he} always took good
    care of it.|It was good to have it back, and it was good to have a new friend.]""",
    )


NIGHT_NOISES = (  # sound, where, what made it, why, a kind deed
    (
        "Tap, tap",
        "at the window",
        "a thin branch",
        "The wind was pushing it",
        "waved good night to the tree",
    ),
    (
        "Whoo, whoo",
        "in the garden",
        "a round owl",
        "It was singing to the moon",
        "sang a song back to it",
    ),
    (
        "Scratch, scratch",
        "at the door",
        "a wet puppy",
        "It wanted to come in",
        "gave it a warm blanket",
    ),
    (
        "Drip, drip",
        "in the kitchen",
        "the rain",
        "It came in by a small hole",
        "put a cup under the hole",
    ),
    (
        "Squeak, squeak",
        "under the bed",
        "a tiny mouse",
        "It was looking for food",
        "gave it a bit of bread",
    ),
    (
        "Bump, bump",
        "on the roof",
        "a happy squirrel",
        "It was playing with a nut",
        "wished it a good night",
    ),
)


def night_noise(rng):
    hero, parent = somebody(rng), rng.choice(FAMILY)
    sound, where, maker, why, deed = rng.choice(NIGHT_NOISES)
    return tell(
        rng,
        f"""
    {once(hero)} {hero.He} [liked the day, but {hero.he} was afraid of the dark|was brave in the day, but not
    so brave at night]. One [cold|dark|windy] night, {hero} was in bed when {hero.he} heard a noise {where}.
    "{sound}!" {hero} [pulled the blanket over {hero.his} head|held {hero.his} pillow close]. "[Is it a
    monster?|What if it is a monster?]" {hero.he} thought. "{sound}!" went the noise again.

    "{parent}, [please come|come quick]!" called {hero}. "There is a monster {where}!" {parent} came in with a
    [little|small] lamp and [gave {hero} a hug|sat down on the bed]. "Let us [go and look|be brave and look]
    together," {parent.he} said. "A noise is not so scary when you know what makes it."

    They went to look. {hero}'s heart beat fast. But there was no monster at all! It was only {maker}. {why}.
    {hero} began to laugh. "[You are not scary|You are no monster]!" {hero.he} said, and {hero.he} {deed}.

    Then {hero} went back to bed. [{parent} gave {hero.him} a kiss, and {hero.he} slept all night.|From that
    night on, {hero.he} was not afraid of the dark.]""",
    )


SHARED_TOYS = (  # toy, advice, what they then did
    (
        "ball",
        "One can throw it, and one can catch it",
        "threw the ball high and caught it again and again",
    ),
    ("swing", "One can swing, and one can push", "took turns, and the swing went up to the sky"),
    ("wagon", "One can ride, and one can pull", "took turns, and the wagon went around and around"),
    ("drum", "One can play, and one can dance", "took turns, and they played and danced all day"),
    (
        "kite",
        "One can hold it, and one can run with the string",
        "ran, and the kite went up to the clouds",
    ),
)


def quarrel(rng):
    one, two = two_friends(rng)
    toy, advice, fun = rng.choice(SHARED_TOYS)
    elder = rng.choice(("old owl", "old turtle", "kind duck", "big dog"))
    return tell(
        rng,
        f"""
    {once_two(one, two)} One day, they [saw|found] {a(rng.choice(COLORS))} {toy} in the {rng.choice(PLACES)}.

    "[I saw it first|It is mine]!" said {one}. "[I want it.|You cannot have it.]" But {two} said, "No, it is
    mine!" They [pushed and pulled|shouted and pushed]. Soon they were both angry. {one} sat down under a
    tree, and {two} sat down [on a rock|next to the path]. Nobody played with the {toy}. It was no fun.

    {upper_first(a(elder))} came by. "Why are you so sad?" asked the {elder}. "We both want the {toy}," said
    {two}, "but there is only one." The {elder} [smiled|thought and thought]. "{advice}," said the {elder}.
    "[Then you can both have fun.|Two can have more fun than one.]"

    {one} looked at {two}. "I am sorry," said {one}. "[You are my friend.|You can go first.]" {two} said, "I
    am sorry, too." They {fun}. They [laughed and laughed|had so much fun].

    At last, they [thanked the {elder}|went home as friends]. [{one} and {two} learned that it is more fun to
    share.|From that day on, they always shared.|A toy is good, but a friend is better.]""",
    )


# What has a string can be pulled down; the rest must be pushed.
STUCK = (  # thing, how it got up there, how it came down
    ("kite", "a strong wind pulled the kite up", "took the string, and pulled the kite down"),
    (
        "balloon",
        "a strong wind took the balloon away",
        "took the string, and pulled the balloon down",
    ),
    ("ball", "the ball went up too high", "gave the ball a push, and down it came"),
    ("hat", "a strong wind took the hat away", "gave the hat a push, and down it came"),
    (
        "paper plane",
        "the paper plane flew too high",
        "gave the paper plane a push, and down it came",
    ),
)
CLIMBERS = (  # who can get up there, how, and a gift to thank them with
    ("bird", "I can fly", "flew up into the tree", "bread"),
    ("squirrel", "I can climb any tree", "ran up the tree", "nuts"),
    ("monkey", "I can climb any tree", "went up from branch to branch", "sweet fruit"),
    ("cat", "I can climb any tree", "went up the tree without a sound", "milk"),
)


def stuck_in_tree(rng):
    hero = somebody(rng)
    thing, ascent, descent = rng.choice(STUCK)
    kind, talent, climb, food = rng.choice(CLIMBERS)
    return tell(
        rng,
        f"""
    One [day|sunny day|windy morning], a little {hero.kind} named {hero} went to the {rng.choice(PLACES)} with
    {a(rng.choice(COLORS))} {thing}. It was [new|a gift], and {hero.he} loved it. {hero.He} [ran and
    laughed|played and sang]. Then {ascent}, and it was stuck in a tall tree!

    "Oh no!" said {hero}. "[How can I get it back?|My {thing} is stuck!]" {hero.He} jumped as high as
    {hero.he} could, but the {thing} was too high. {hero.He} [shook the tree|tried with a long stick], but the
    {thing} did not come down. {hero} [sat down and cried|was very sad].

    {upper_first(a(kind))} heard {hero.him}. "What is wrong?" asked the {kind}. "My {thing} is stuck, and [the
    tree is too tall for me|I cannot get it down]," said {hero}. "{talent}," said the {kind}. "[Let me help
    you!|I will get it for you!]" The {kind} {climb}, {descent}. {hero} [jumped with joy|laughed and danced].
    "Thank you, {kind}! [You are so kind.|You are a good friend.]"

    The next day, {hero} came back with some {food} for the {kind}. [They ate and played together.|From that
    day on, they were friends.] It is good to [ask for help|have friends who help].""",
    )


BROKEN = (  # thing, mishap, tools, how it was mended, how it was used again
    (
        "teddy bear",
        "pulled it, and its arm came off",
        "a needle and thread",
        "sewed the arm on",
        "hugged it",
    ),
    (
        "boat",
        "dropped it, and it got a hole",
        "some wood and glue",
        "closed the hole",
        "put it on the water",
    ),
    (
        "chair",
        "jumped on it, and a leg came off",
        "a hammer and nails",
        "put the leg back on",
        "sat on it",
    ),
    (
        "cup",
        "dropped it, and the handle came off",
        "glue",
        "put the handle back on",
        "drank milk from it",
    ),
    (
        "book",
        "pulled at it, and a page came out",
        "some tape",
        "put the page back in",
        "read it in bed",
    ),
)


def broken_thing(rng):
    hero, helper = somebody(rng), rng.choice(FAMILY)
    thing, mishap, tools, mending, use = rng.choice(BROKEN)
    return tell(
        rng,
        f"""
    {once(hero)} {hero.He} had a [small|pretty] {rng.choice(COLORS)} {thing}. {hero.He} [loved it more than
    all {hero.his} other things|had wanted one for a long time].

    One [day|morning], {hero} {mishap}. "Oh no! I broke it!" said {hero}. {hero.He} tried to fix it, but
    {hero.he} [was too little|did not know how]. {hero} [began to cry|felt very sad].

    Then {hero.his} {helper.kind} heard {hero.him} and came in. "What happened?" asked {helper}. "I broke my
    {thing}," said {hero}. "[It is all my fault.|I am so sad.]" {helper} [gave {hero.him} a hug|smiled]. "We
    do not have to throw it away," {helper.he} said. "[I know what to do.|We can fix it together.]" {helper}
    came back with {tools}. {hero} held the {thing} [very still|with care], and {helper} {mending}.
    "[There!|All done!]" said {helper}. "It is as good as new."

    {hero} {use}. It was [as good as before|not broken now]! "Thank you, {helper}!" {hero.he} said. [From that
    day on, {hero} took good care of the {thing}.|{hero} learned that many broken things can be fixed.]""",
    )


RAINY_GAMES = (  # idea, what it needs, how it is made, the fun
    (
        "make a tent",
        "a sheet and two chairs",
        "put the sheet over the chairs",
        "told stories in the tent",
    ),
    (
        "bake cookies",
        "eggs, milk, and sugar",
        "mixed it all in a big bowl",
        "ate warm cookies by the fire",
    ),
    (
        "make a ship",
        "a big box and a flag",
        "put the flag on the box",
        "sailed the ship to look for gold",
    ),
    (
        "draw a picture",
        "some paper and crayons",
        "drew the sun and flowers",
        "put the picture on the wall",
    ),
    (
        "put on a show",
        "some old socks and buttons",
        "gave each sock two button eyes",
        "made the socks sing",
    ),
    (
        "build a castle",
        "some blocks",
        "put block on block on block",
        "played king and queen in the castle",
    ),
)


def rainy_day(rng):
    hero, helper = somebody(rng), rng.choice(FAMILY)
    idea, needs, making, fun = rng.choice(RAINY_GAMES)
    return tell(
        rng,
        f"""
    One [day|morning], a little {hero.kind} named {hero} sat by the window. {hero.He} wanted to [play in the
    {rng.choice(PLACES)}|ride {hero.his} bike|play outside]. But it was raining and raining. {hero} waited,
    but the rain did not stop. "[I do not like the rain|There is nothing to do]!" {hero} told {helper}.

    {helper} smiled. "[We can have fun inside, too|A rainy day can be fun, too]," {helper.he} said. "Let us
    {idea}!" {hero} [jumped up|began to smile]. They [got|found] {needs}. They {making}. Then they {fun}. They
    had so much fun that {hero} [did not think of the rain at all|did not hear the rain].

    After a [long time|while], {helper} said, "Look! The rain has stopped!" [There was a big rainbow in the
    sky.|The sun was out, and there were puddles everywhere.] "Hooray!" said {hero}. "But can we {idea} again
    when it rains?" {helper} laughed and said, "Of course we can." [From that day on, {hero} was not sad when
    it rained.|{hero} learned that a rainy day can be a good day.|{hero} gave {helper} a big hug.]""",
    )


# Each move can be answered by someone who stays hidden.
SHY_GAMES = (  # move, answer from the hiding place, the game together
    ("rolled a ball there", "the ball came rolling back", "played with the ball"),
    ("put some berries there", "somebody ate them one by one", "looked for more berries"),
    ("went tap, tap, tap on a drum", "somebody went tap, tap, tap, too", "played the drum"),
    ("sang half of a song", "a small voice sang the other half", "sang all the songs they knew"),
    (
        "pushed a toy car there",
        "the car came back with a flower in it",
        "made a long road for the car",
    ),
)


def shy_friend(rng):
    hero, friend = two_friends(rng)
    move, answer, game = rng.choice(SHY_GAMES)
    parent, hiding = rng.choice(FAMILY), rng.choice(("tree", "bush", "fence", "rock"))
    return tell(
        rng,
        f"""
    {once(hero)} {hero.He} [had nobody to play with|wanted to have a friend]. One day, a new {friend.kind}
    came to live [next door|near {hero.him}]. {hero} ran outside to say hello.

    But the new {friend.kind} was shy and hid behind a {hiding}. "Hello! I am {hero}," said {hero}. "[Do you
    want to play?|Will you come out?]" Nobody came out. {hero} [felt sad|did not know what to do]. {hero.He}
    asked {hero.his} {parent.kind}, "[Why does {friend.he} hide?|Does {friend.he} not like me?]" {parent}
    said, "{friend.He} is new here, and it is all so strange. [Be kind and wait.|Give {friend.him} time.]"

    So {hero} went back to the {hiding} and {move}. Then {hero.he} waited. [Soon|After a while], {answer}!
    {hero} [laughed|smiled]. Then the new {friend.kind} [looked|came] out from behind the {hiding}.
    "[Hello|Hi]," {friend.he} said in a [small|tiny] voice. "I am {friend}. [I was scared.|I did not know what
    to say.]" {hero} said, "[I am so glad that you came out.|That is all right. I get scared, too.]"

    {hero} and {friend} {game} until the sun went down. [From that day on, they were friends.|{friend} was not
    shy any more, and {hero} was not alone any more.|A friend is worth waiting for.]""",
    )


RESCUES = (  # small one, trouble, tool, rescue, thanks
    (
        "ant",
        "had fallen into the pond",
        "a leaf",
        "held out the leaf, and the ant climbed on it",
        "waved",
    ),
    (
        "turtle",
        "was on its back",
        "a stick",
        "pushed with the stick, and the turtle rolled over",
        "smiled",
    ),
    (
        "fish",
        "was in a tiny puddle",
        "a bucket",
        "took the fish to the pond in the bucket",
        "jumped for joy",
    ),
    (
        "bee",
        "was too tired to fly",
        "a flower",
        "gave the bee a drink from the flower",
        "flew around them",
    ),
    (
        "butterfly",
        "was stuck in a web",
        "a stick",
        "took the web away with the stick",
        "flew around them",
    ),
    (
        "snail",
        "was on a busy road",
        "a big leaf",
        "took the snail to the grass on the leaf",
        "smiled",
    ),
)


def small_rescue(rng):
    hero, friend = two_friends(rng)
    small, trouble, tool, rescue, thanks = rng.choice(RESCUES)
    return tell(
        rng,
        f"""
    {once_two(hero, friend)} They [loved to run and play|went for a walk every day]. One [day|morning], {hero}
    stopped. "[Wait! I hear a small voice|Look! I see something small]," {hero.he} said.

    It was a little {small}. The {small} {trouble}. "[Help!|Please help me!]" it said [in a tiny voice|again
    and again]. "It is only {a(small)}," said {friend}. "[Come and play!|Let us go!]" But {hero} did not go.
    "It is small, but it is [scared|all alone]," {hero.he} said. "[We are big, so we can help.|We must help.]"

    {friend} [thought about it|looked at the {small}]. "You are right," {friend.he} said. "[What can we do?|I
    want to help, too.]" They looked around, and {friend} found {tool}. "[We can use this!|This is just
    right!]" said {friend}. With great care, {hero} {rescue}.

    "Thank you!" said the {small}, and it {thanks}. {hero} and {friend} were [glad|happy]. [After that, the
    {small} was their friend.|"I am glad that we stopped," said {friend}.] [They learned that nobody is too
    small to be helped.|It does not take long to be kind.|They never forgot that day.]""",
    )


MISTAKES = (  # fun, mishap, what was spoiled, how they made it good
    (
        "threw a ball in the house",
        "Crash! The blue cup broke",
        "cup",
        "put the cup back together with glue",
    ),
    (
        "ran around with some juice",
        "Splash! The juice fell on the rug",
        "rug",
        "washed the rug with water",
    ),
    (
        "danced on the flowers",
        "Crunch! The flowers were flat",
        "flowers",
        "planted many new flowers",
    ),
    ("had a bite of the cake", "Yum! Soon the cake was all gone", "cake", "baked a new cake"),
    (
        "played with red paint",
        "Splat! Paint got on the wall",
        "wall",
        "washed the wall until it was white",
    ),
    (
        "jumped on the bed",
        "Pop! The pillow broke open",
        "pillow",
        "sewed the pillow with needle and thread",
    ),
)


def mistake(rng):
    hero, parent = somebody(rng), rng.choice(FAMILY)
    fun, mishap, spoiled, repair = rng.choice(MISTAKES)
    return tell(
        rng,
        f"""
    {once(hero)} One [day|morning], {hero} {fun}. {hero.He} knew that {hero.his} {parent.kind} would not like
    it, but it was hard to stop. {mishap}!

    "Oh no!" said {hero}. "What will {parent} say?" {hero.He} [ran away and hid behind the door|hid under the
    table]. Soon {parent} came home. "[What happened to|Who did this to] the {spoiled}?" asked {parent}.
    {hero} did not [say a word|make a sound].

    But {hero} [felt bad inside|had a bad feeling in {hero.his} tummy]. {hero.He} did not want to [play|eat].
    At last, {hero.he} went to {parent}. "It was me," said {hero}. "I am [so|very] sorry."

    {parent} gave {hero.him} a [big|long] hug. "I am sad about the {spoiled}," said {parent}, "but I am
    [glad|proud] that you told me the truth. [Everybody makes mistakes.|That was very brave.] We can make it
    good again." CombinedOptimizer, they {repair}.

    {hero} [felt happy again|felt much better]. [{hero.He} learned that it is good to tell the truth.|From
    that day on, {hero} always told the truth.|That night, {hero} slept very well.]""",
    )


SKILLS = (  # skill, first failure, second failure, tip, success
    (
        "ride a bike",
        "The bike fell over",
        "It fell over again",
        "Look far ahead",
        "The bike went on and on",
    ),
    (
        "jump rope",
        "The rope was too fast",
        "It was still too fast",
        "Count to two",
        "One, two, jump",
    ),
    (
        "swim",
        "There was water everywhere",
        "There was more water",
        "Kick your feet",
        "Kick, kick, splash",
    ),
    (
        "fly a kite",
        "The kite fell down",
        "It hit a bush",
        "Run into the wind",
        "The kite went up and up",
    ),
    (
        "whistle",
        "There was no sound",
        "There was only air",
        "Make your mouth round",
        "It was a pretty sound",
    ),
    (
        "skate",
        "Bump! The ice was hard",
        "Bump, bump, bump",
        "Take small steps",
        "There was not one bump",
    ),
)


def learning(rng):
    hero, friend = two_friends(rng)
    skill, failure, second_failure, tip, success = rng.choice(SKILLS)
    return tell(
        rng,
        f"""
    {once(hero)} {hero.He} had a [good|best] friend, {a(friend.kind)} named {friend}. {friend} could {skill},
    but {hero} could not. "[I want to {skill}, too|I wish I could {skill}]," said {hero}.

    One [day|sunny day|morning], {hero} tried to {skill}. {failure}. {hero.He} tried again. {second_failure}.
    {hero} was [sad|angry|tired]. "I cannot do it!" {hero.he} said.

    {friend} [sat down next to {hero.him}|came to {hero.him}]. "It was hard for me, too," said {friend}. "I
    tried [many, many times|again and again]. [Do not give up!|You can do it!] {tip}." {hero} [thought about
    it|took a deep breath]. "I will try [one more time|again]," {hero.he} said.

    {hero} did what {friend} had said. The first time, it was [a bit better|almost right]. The next time,
    {hero} did it! {success}! "[Look at me!|I did it!] I can {skill}!" {hero.he} [shouted|said with a big
    smile]. {friend} [clapped|jumped with joy].

    [{hero} and {friend} were so happy that they danced.|That night, {hero} told {hero.his}
    {rng.choice(FAMILY).kind} all about it.] [{hero} learned that you must try and try again.|It is good to
    try, and it is good to have a friend.|Hard things get easy when you do not give up.]""",
    )


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
    return rng.choice(PLOTS)(rng)
