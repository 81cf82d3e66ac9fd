#!lua
-- PATCH: replace the user's metadata (core.conversation.set_metadata).
-- KEYS 1 meta
-- ARGV 1 metadata (JSON)
-- ->   head | nil
-- @include now
-- @include head
local head = read_head()
if not head then return false end
head.metadata, head.updated = ARGV[1], text(now)
redis.call('HSET', KEYS[1], 'metadata', head.metadata, 'updated', head.updated)
return listed(head)
