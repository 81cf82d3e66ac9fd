#!lua flags=allow-oom
-- RELEASE: give the conversation up, only when it is settled (core.conversation.release).
-- KEYS 1 meta
-- ARGV 1 channel  2 owner  3 epoch  4 seq
-- ->   'OK' | 'PENDING' | 'FENCED'
-- @include now
-- @include publish
-- @include settled
local head = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'seq', 'position', 'done', 'cursor', 'asks', 'status')
if head[1] ~= ARGV[2] or head[2] ~= ARGV[3] then return 'FENCED' end
if head[3] ~= ARGV[4] or not may_leave(head[8], head[4], head[5], head[6], head[7]) then return 'PENDING' end
redis.call('HSET', KEYS[1], 'owner', '', 'nonce', '')
publish_status(ARGV[1], ARGV[3], at_rest(head[7]))
return 'OK'
