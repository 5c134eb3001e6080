"""When training is stable: minibatch noise, exact sharpness.

How sharp a minimum an optimizer's step lets it stay at is its config's ``threshold``
(``optim.thresholds``); ``sgd`` says the same for minibatches, where the whole set of per-example
gradients matters; ``exact`` has the models whose sharpness is a norm of their parameters.
Everything is of the mean of losses over examples, with the square loss as 1/2 (f - y)^2: another
scaling is another learning rate.
"""
