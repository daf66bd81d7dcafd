"""Statistics of studies: accuracies with confidence intervals, comparisons of arms, and points for a search to try.

There are two questions about a pair of arms. Do these two *models* differ? The test rows are the sample: McNemar's
exact test (`mcnemar`). Do the two *methods* differ? The seeds are a sample too: a t test over paired differences, with
the rows' variance added (`paired_seeds`). `compare` answers both for all arms and corrects the p-values.
"""
