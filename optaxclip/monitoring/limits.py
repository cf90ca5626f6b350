"""The numbers on which the rules of `diagnose` rest, each with its reason.

They were set on the catalogue of simulated runs in the tests, so that of 200 runs of each kind at
least 98 % are named right and at most 1 % of the healthy ones are spoken of.
"""

# Steps: with fewer, a fit of noise alone reaches the limits below now and then.
ENOUGH = 20
# Steps that make a tail: of fewer, not one is in the last percent.
ENOUGH_FOR_TAILS = 100
# Steps on either side of a step that say what is usual there: short beside a warm-up or a cycle of
# the learning rate, long beside a burst.
NEIGHBOURS = 25

# A norm is large if noise of this run would reach it in one run of 500 by chance. That is
# extrapolated from the 90th percentile as from a power law, the longest tail that there is.
CHANCE = 0.002
# Bounds of that: restarts of cycles and small batches give factors of 5 to 8; over 100 is large
# whatever the noise, as log-normal noise that wide would need a deviation above 1.
LARGE, LARGE_FOR_SURE = 10.0, 100.0
# Before there are enough steps to know the noise.
LARGE_UNKNOWN = 30.0

# At the first steps nothing is usual yet. Losses that are sums have norms of hundreds; if all has
# ended within three steps a norm from 1000 on has done it.
FIRST_NORM, FIRST_STEPS = 1e3, 3

# A block is first if it rises this many times as far as the median block.
AHEAD = 1.5

# A level that lasts is another one if it is this many times the one before: 5-fold steps up are
# seen at restarts, and 10-fold ones where data change.
JUMP = 20.0
# Steps from a quarter to three quarters of a rise: an explosion in 2 has 2, one in 5 has 3.
JUMP_STEPS = 2
# An exponential, over at least 8 steps: tenfold with this fit is noise once in a thousand runs.
RISE, RISE_R2, RISE_STEPS = 10.0, 0.85, 8
# A rise to NaN goes on until then: its mean height, on a log scale, is half of the highest, or
# less; that of a level that was reached long before nears 1.
STILL_RISING = 0.85

# Steps within which spikes are one event, and how many make a burst of it: momentum lets one
# spike fade over two or three.
EVENT_STEPS, BURST = 20, 4
# A tail index below 2: the variance is infinite. With 1 % of the norms over 4 medians, as
# log-normal noise has indices below 2 at the sizes of small runs.
TAIL_INDEX, TAIL_RATIO = 2.0, 4.0

# Weights that change threefold within ten steps: warm-ups and zero starts do so, with a falling
# loss; healthy runs do not with a rising one.
LEAP, LEAP_STEPS = 3.0, 10
# Weights that have moved this far when the norms become large have moved before them.
MOVED = 1.5
# Relative to their norm, weights moved less than this in the whole run: float32 itself resolves
# 1e-7, and a learning rate for which this is right needs 10,000 times the steps.
STILL = 1e-4
# Growth of weights: threefold is outside of what training does to a norm, unless it started at 0,
# where growth slows down: late growth under early growth to this power.
GROWN, GROWN_R2, GROWN_LATE = 3.0, 0.8, 0.75

# Steps without a gradient that make a layer dead though it gets one now and then: units die one
# by one, and some batch still reaches the last of them.
DYING = 0.5

# Of a fall: to a hundredth while the loss does not fall, to 1e-4 if the loss is not known.
FADED, FADED_UNKNOWN = 1e-2, 1e-4
# Norms of the first and the last of at least four layers; 30-fold is common in healthy models.
DEPTH, DEPTH_LAYERS = 100.0, 4

# Losses: below 2 % and three standard errors the eye sees no change; 10 % and four are one.
UNMOVED, UNMOVED_ERRORS = 0.02, 3.0
RISEN, RISEN_ERRORS = 0.1, 4.0

# Overflows in a row: a loss scale of 2^16, the usual one, is 1 after 16 halvings.
HALVINGS = 16

# Shares of steps.
ALWAYS = 0.95
SKIPPED = 0.9
# The nearest that a norm came to a bound that is never reached: a bound of five times the largest
# is still a reserve.
RESERVE = 0.2
# Norms of one device over those of the mean of two with independent noise are sqrt(2) apart.
BEFORE_MEAN = 1.2
