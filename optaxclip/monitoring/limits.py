"""The numbers that the rules of `diagnose` use, each with its reason.

They were tuned on the catalogue of simulated runs in the tests, so that of 200 runs of each kind at
least 98 % are named correctly, and at most 1 % of the healthy ones get a sign.
"""

# Steps: with fewer, a fit to pure noise occasionally reaches the limits below.
ENOUGH = 20
# Steps needed to judge a tail: with fewer, not one step is in the last percent.
ENOUGH_FOR_TAILS = 100
# Steps on either side of a step that tell what is usual there: short compared with a warm-up or a
# cycle of the learning rate, long compared with a burst.
NEIGHBOURS = 25

# A norm is large if the noise of this run would reach it by chance in one run of 500. That is
# extrapolated from the 90th percentile with a power law, the longest tail there is.
CHANCE = 0.002
# Its limits: restarts of cycles and small batches give factors of 5 to 8; above 100 is large with
# any noise, because log-normal noise that wide would need a deviation above 1.
LARGE, LARGE_FOR_SURE = 10.0, 100.0
# Used until there are enough steps to know the noise.
LARGE_UNKNOWN = 30.0

# At the first steps nothing is usual yet. Losses that are sums have norms of hundreds, but if
# everything ends within three steps, a norm of 1000 or more is the cause.
FIRST_NORM, FIRST_STEPS = 1e3, 3

# A block is first if it rises this many times as far as the median block.
AHEAD = 1.5

# A lasting level is a new one if it is this many times the level before: 5-fold jumps occur at
# restarts, and 10-fold ones where the data change.
JUMP = 20.0
# Steps from a quarter to three quarters of a rise: an explosion in 2 has 2, one in 5 has 3.
JUMP_STEPS = 2
# An exponential over at least 8 steps: noise grows tenfold with this fit once in a thousand runs.
RISE, RISE_R2, RISE_STEPS = 10.0, 0.85, 8
# A rise to NaN lasts until the NaN: its mean height on a log scale is at most half of the highest.
# For a level that was reached long before, the mean is close to 1.
STILL_RISING = 0.85

# Steps within which spikes are one event, and how many spikes make it a burst: with momentum a
# single spike fades over two or three steps.
EVENT_STEPS, BURST = 20, 4
# Below a tail index of 2 the variance is infinite. 1 % of the norms must also exceed 4 medians,
# because log-normal noise has indices below 2 in runs this small.
TAIL_INDEX, TAIL_RATIO = 2.0, 4.0

# Weights that change threefold within ten steps: in warm-ups and from a start at zero they do, with
# a falling loss; with a rising loss they do not in a healthy run.
LEAP, LEAP_STEPS = 3.0, 10
# Weights that have moved this far when the norms become large moved before the norms.
MOVED = 1.5
# Weights moved less than this in the whole run, relative to their norm: float32 resolves 1e-7, and
# a learning rate for which this is right would need 10,000 times the steps.
STILL = 1e-4
# Growth of weights: training does not triple a norm unless it started near 0, and then growth slows
# down: late growth stays below early growth to this power.
GROWN, GROWN_R2, GROWN_LATE = 3.0, 0.8, 0.75

# The share of steps without a gradient at which a layer is dead although it still gets some: units
# die one by one, and an occasional batch still reaches the last of them.
DYING = 0.5

# How far norms fall: to a hundredth while the loss does not fall, to 1e-4 if it is not known.
FADED, FADED_UNKNOWN = 1e-2, 1e-4
# Ratio of the norms of the first and last of at least four layers; healthy models often have 30.
DEPTH, DEPTH_LAYERS = 100.0, 4

# A record begins late if its first row should be later than this one: the step that compiles is
# often left out, but a loss may have converged within ten steps.
LATE = 3.0

# What is known only at every k-th row, with this share of exceptions, was not recorded in between:
# rows that are NaN for a reason are not evenly apart.
REGULAR = 0.9

# Losses: below 2 % and three standard errors a change is invisible; 10 % and four are a change.
UNMOVED, UNMOVED_ERRORS = 0.02, 3.0
RISEN, RISEN_ERRORS = 0.1, 4.0
# A first loss is no noise if it is this many times as far above the usual one as any later loss:
# with a tail index of 2 this happens by chance in one of 80 runs of 40 steps, or 400 of 200.
ALONE = 2.0

# Overflows in a row: the usual loss scale of 2^16 is 1 after 16 halvings.
HALVINGS = 16

# Shares of steps.
ALWAYS = 0.95
SKIPPED = 0.9
# How close norms came to a bound that is never reached: a bound of up to five times the largest
# norm is a sensible reserve.
RESERVE = 0.2
# The norm on one device is sqrt(2) times that of the mean of two with independent noise.
BEFORE_MEAN = 1.2
