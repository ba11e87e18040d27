"""
The words of the synthetic stories: one table for each plot in synthetic.py.

The entries of a row fit together, so that a plot draws a whole row. A comment names the columns.
"""

# fmt: off
# subject, object and possessive pronoun
SHE = ("she", "her", "her")
HE = ("he", "him", "his")
NAMES = {
    SHE: ("Lily", "Mia", "Anna", "Sue", "Amy", "Lucy", "Emma", "Zoe", "Rose", "Kate", "Dot",
          "Ella", "Nora"),
    HE: ("Tom", "Ben", "Max", "Tim", "Sam", "Jack", "Leo", "Dan", "Finn", "Bob", "Pip", "Toby",
         "Noah"),
}
CHILDREN = {SHE: "girl", HE: "boy"}
# None of these flies, swims well or eats a friend, so each of them fits every plot.
ANIMALS = ("rabbit", "bear", "fox", "pig", "goat", "panda", "lamb")
COLORS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "white")
OUTDOORS = ("park", "garden", "yard", "meadow", "field")

# The nature of a thing decides where it can get lost, and so who can find it.
LOSABLE = {
    "rolling": ("ball", "toy car", "marble"),
    "soft": ("teddy bear", "hat", "blanket", "scarf"),
    "shiny": ("bell", "key", "coin"),
}

FINDERS = (  # nature, finder, offer, where it was
    ("rolling", "mouse", "I am small, so I can look under things",
     "under a bench. It had rolled there"),
    ("rolling", "duck", "I live in the tall grass, so I can look there",
     "in the grass. It had rolled there"),
    ("soft", "dog", "My nose is good, so I can smell it",
     "behind a bush. A puppy had taken it there"),
    ("soft", "hen", "I saw something soft near my house",
     "in the hay. A baby chick was sleeping on it"),
    ("shiny", "owl", "My eyes are good, so I can see it shine",
     "under a leaf. It was shining in the sun"),
    ("shiny", "frog", "I can swim, so I can look in the water",
     "in the pond. It was shining in the water"),
)

NIGHT_NOISES = (  # sound, where, what made it, why, a kind deed
    ("Tap, tap", "at the window", "a thin branch", "The wind was pushing it",
     "waved good night to the tree"),
    ("Whoo, whoo", "in the garden", "a round owl", "It was singing to the moon",
     "sang a song back to it"),
    ("Scratch, scratch", "at the door", "a wet puppy", "It wanted to come in",
     "gave it a warm blanket"),
    ("Drip, drip", "in the kitchen", "the rain", "It came in by a small hole",
     "put a cup under the hole"),
    ("Squeak, squeak", "under the bed", "a tiny mouse", "It was looking for food",
     "gave it a bit of bread"),
    ("Bump, bump", "on the roof", "a happy squirrel", "It was playing with a nut",
     "wished it a good night"),
)

SHARED_TOYS = (  # toy, advice, what they then did
    ("ball", "One can throw it, and one can catch it",
     "threw the ball high and caught it again and again"),
    ("swing", "One can swing, and one can push", "took turns, and the swing went up to the sky"),
    ("wagon", "One can ride, and one can pull", "took turns, and the wagon went around and around"),
    ("drum", "One can play, and one can dance", "took turns, and they played and danced all day"),
    ("kite", "One can hold it, and one can run with the string",
     "ran, and the kite went up to the clouds"),
)

# What has a string can be pulled down; the rest must be pushed.
STUCK = (  # thing, how it got up there, how it came down
    ("kite", "a strong wind pulled the kite up", "took the string, and pulled the kite down"),
    ("balloon", "a strong wind took the balloon away",
     "took the string, and pulled the balloon down"),
    ("ball", "the ball went up too high", "gave the ball a push, and down it came"),
    ("hat", "a strong wind took the hat away", "gave the hat a push, and down it came"),
    ("paper plane", "the paper plane flew too high",
     "gave the paper plane a push, and down it came"),
)

CLIMBERS = (  # who can get up there, how, and a gift to thank them with
    ("bird", "I can fly", "flew up into the tree", "bread"),
    ("squirrel", "I can climb any tree", "ran up the tree", "nuts"),
    ("monkey", "I can climb any tree", "went up from branch to branch", "sweet fruit"),
    ("cat", "I can climb any tree", "went up the tree without a sound", "milk"),
)

BROKEN = (  # thing, mishap, tools, how it was mended, how it was used again
    ("teddy bear", "pulled it, and its arm came off", "a needle and thread", "sewed the arm on",
     "hugged it"),
    ("boat", "dropped it, and it got a hole", "some wood and glue", "closed the hole",
     "put it on the water"),
    ("chair", "jumped on it, and a leg came off", "a hammer and nails", "put the leg back on",
     "sat on it"),
    ("cup", "dropped it, and the handle came off", "glue", "put the handle back on",
     "drank milk from it"),
    ("book", "pulled at it, and a page came out", "some tape", "put the page back in",
     "read it in bed"),
)

RAINY_GAMES = (  # idea, what it needs, how it is made, the fun
    ("make a tent", "a sheet and two chairs", "put the sheet over the chairs",
     "told stories in the tent"),
    ("bake cookies", "eggs, milk, and sugar", "mixed it all in a big bowl",
     "ate warm cookies by the fire"),
    ("make a ship", "a big box and a flag", "put the flag on the box",
     "sailed the ship to look for gold"),
    ("draw a picture", "some paper and crayons", "drew the sun and flowers",
     "put the picture on the wall"),
    ("put on a show", "some old socks and buttons", "gave each sock two button eyes",
     "made the socks sing"),
    ("build a castle", "some blocks", "put block on block on block",
     "played king and queen in the castle"),
)

# Each move can be answered by someone who stays hidden.
SHY_GAMES = (  # move, answer from the hiding place, the game together
    ("rolled a ball there", "the ball came rolling back", "played with the ball"),
    ("put some berries there", "somebody ate them one by one", "looked for more berries"),
    ("went tap, tap, tap on a drum", "somebody went tap, tap, tap, too", "played the drum"),
    ("sang half of a song", "a small voice sang the other half", "sang all the songs they knew"),
    ("pushed a toy car there", "the car came back with a flower in it",
     "made a long road for the car"),
)

RESCUES = (  # small one, trouble, tool, rescue, thanks
    ("ant", "had fallen into the pond", "a leaf", "held out the leaf, and the ant climbed on it",
     "waved"),
    ("turtle", "was on its back", "a stick", "pushed with the stick, and the turtle rolled over",
     "smiled"),
    ("fish", "was in a tiny puddle", "a bucket", "took the fish to the pond in the bucket",
     "jumped for joy"),
    ("bee", "was too tired to fly", "a flower", "gave the bee a drink from the flower",
     "flew around them"),
    ("butterfly", "was stuck in a web", "a stick", "took the web away with the stick",
     "flew around them"),
    ("snail", "was on a busy road", "a big leaf", "took the snail to the grass on the leaf",
     "smiled"),
)

MISTAKES = (  # fun, mishap, what was spoiled, how they made it good
    ("threw a ball in the house", "Crash! The blue cup broke", "cup",
     "put the cup back together with glue"),
    ("ran around with some juice", "Splash! The juice fell on the rug", "rug",
     "washed the rug with water"),
    ("danced on the flowers", "Crunch! The flowers were flat", "flowers",
     "planted many new flowers"),
    ("had a bite of the cake", "Yum! Soon the cake was all gone", "cake", "baked a new cake"),
    ("played with red paint", "Splat! Paint got on the wall", "wall",
     "washed the wall until it was white"),
    ("jumped on the bed", "Pop! The pillow broke open", "pillow",
     "sewed the pillow with needle and thread"),
)

SKILLS = (  # skill, first failure, second failure, tip, success
    ("ride a bike", "The bike fell over", "It fell over again", "Look far ahead",
     "The bike went on and on"),
    ("jump rope", "The rope was too fast", "It was still too fast", "Count to two",
     "One, two, jump"),
    ("swim", "There was water everywhere", "There was more water", "Kick your feet",
     "Kick, kick, splash"),
    ("fly a kite", "The kite fell down", "It hit a bush", "Run into the wind",
     "The kite went up and up"),
    ("whistle", "There was no sound", "There was only air", "Make your mouth round",
     "It was a pretty sound"),
    ("skate", "Bump! The ice was hard", "Bump, bump, bump", "Take small steps",
     "There was not one bump"),
)
# fmt: on
