#!lua
-- FIRE: turn an alarm into a message, once: it is removed in the same step (core.intents.fire).
-- KEYS 1 meta  2 in  3 seen  4 alarms
-- ARGV 1 channel  2 alarm  3 max pending
-- ->   {'OK'|'DUP', position, owner, epoch} | {'NOT_FOUND'|'CLOSED'|'FAILED'|'HELD'|'FULL'}
-- @include now
-- @include publish
-- @include refusal
-- @include inbox
local head = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'position', 'done', 'status', 'user')
if not head[5] then return {'NOT_FOUND'} end
if head[5] == 'stopping' or head[5] == 'stopped' then
  redis.call('HDEL', KEYS[4], ARGV[2])
  return {'CLOSED'}
end
if head[5] ~= 'running' then return {refusal(head[5])} end
local data = redis.call('HGET', KEYS[4], ARGV[2])
local seen = redis.call('ZSCORE', KEYS[3], ARGV[2])
if not data or seen then
  redis.call('HDEL', KEYS[4], ARGV[2])
  return {'DUP', tonumber(seen or 0), head[1], head[2]}
end
local last = tonumber(head[3])
if last - tonumber(head[4]) >= tonumber(ARGV[3]) then return {'FULL'} end
local position, ts = text(last + 1), text(now)
put_inbox(position, ARGV[2], 'alarm', head[6], ts, data)
redis.call('ZADD', KEYS[3], position, ARGV[2])
redis.call('HDEL', KEYS[4], ARGV[2])
publish_inbox(ARGV[1], position, ARGV[2], 'alarm', head[6], ts, data)
return {'OK', last + 1, head[1], head[2]}
