"""Block holes: from some layer on, attention sees a block table with whole blocks left out.

Tokens are dropped in the middle of a model although the scheduler keeps a block for each of them.
`plan` says in whole blocks what may go, `view` hides the blocks from the layers above, and
`compact` runs those layers on the rows that are left.
"""
