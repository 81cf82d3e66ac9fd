#!lua flags=no-writes
-- INBOX: head and unread entries in one step.
-- KEYS 1 meta  2 in
-- ->   {head, entries} | nil
-- @include head
local head = read_head()
if not head then return false end
return {listed(head), redis.call('XRANGE', KEYS[2], '-', '+')}
