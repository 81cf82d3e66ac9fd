#!lua flags=allow-oom
-- DISOWN: clear a buried owner, or raise the epoch of an unowned conversation (core.conversation.disown).
-- KEYS 1 meta
-- ARGV 1 channel  2 owner ('' for nobody)  3 epoch
-- ->   'OK' | 'PENDING' | 'CONFLICT' | 'NOT_FOUND'
-- @include now
-- @include publish
-- @include settled
local head = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'position', 'done', 'cursor', 'asks', 'status')
if not head[2] then return 'NOT_FOUND' end
if head[1] ~= ARGV[2] or head[2] ~= ARGV[3] then return 'CONFLICT' end
if ARGV[2] ~= '' and not may_leave(head[7], head[3], head[4], head[5], head[6]) then return 'PENDING' end
redis.call('HSET', KEYS[1], 'owner', '', 'nonce', '', 'epoch', text(tonumber(ARGV[3]) + 1))
if ARGV[2] ~= '' then publish_status(ARGV[1], ARGV[3], at_rest(head[6])) end
return 'OK'
