"""What the weights do to a training set, from its rows alone: the table, the rows, the page, the advice."""
