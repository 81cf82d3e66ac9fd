#!lua
-- RESUME: what a user asks for after a stop; nothing else clears it (core.conversation.resume).
-- KEYS 1 meta
-- ->   'OK' | 'RUNNING' | 'BUSY' | 'NOT_FOUND'
-- @include now
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return 'NOT_FOUND' end
if status == 'running' then return 'RUNNING' end
if status ~= 'stopped' then return 'BUSY' end
redis.call('HSET', KEYS[1], 'status', 'running', 'updated', text(now))
return 'OK'
