#!lua
-- RESUME: what a user asks for after a stop, or when a turn is not to be repeated unasked
-- (core.conversation.resume).
-- KEYS 1 meta
-- ARGV 1 channel
-- ->   'OK' | 'RUNNING' | 'BUSY' | 'NOT_FOUND'
-- @include now
-- @include publish
-- @include settled
local head = redis.call('HMGET', KEYS[1], 'status', 'epoch', 'asks')
local status = head[1]
if not status then return 'NOT_FOUND' end
if status == 'running' then return 'RUNNING' end
if status == 'stopping' then return 'BUSY' end
-- Raised, so that no claim that was refused comes true.
redis.call('HSET', KEYS[1], 'status', 'running', 'epoch', text(tonumber(head[2]) + 1), 'strikes', '0', 'updated',
  text(now))
publish_status(ARGV[1], head[2], at_rest(head[3]))
return 'OK'
