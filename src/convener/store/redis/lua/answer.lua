#!lua
-- ANSWER: take the answer to an open question; the first one closes it (core.intents.answer).
-- KEYS 1 meta  2 in  3 seen  4 asks
-- ARGV 1 channel  2 question  3 message id  4 user  5 data (JSON)
-- ->   {'OK'|'DUP', position, owner, epoch} | {'NOT_FOUND'|'CLOSED'|'FAILED'|'HELD'|'ASK_CLOSED'|'FULL'}
-- @include now
-- @include publish
-- @include refusal
-- @include inbox
local MAX_UNREAD = 1000
local head = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'position', 'cursor', 'status')
if not head[5] then return {'NOT_FOUND'} end
if head[5] ~= 'running' then return {refusal(head[5])} end
local seen = redis.call('ZSCORE', KEYS[3], ARGV[3])
if seen then return {'DUP', tonumber(seen), head[1], head[2]} end
if redis.call('HEXISTS', KEYS[4], ARGV[2]) == 0 then return {'ASK_CLOSED'} end
local last = tonumber(head[3])
if last - tonumber(head[4]) >= MAX_UNREAD then return {'FULL'} end
local position, ts = text(last + 1), text(now)
put_inbox(position, ARGV[3], 'answer', ARGV[4], ts, ARGV[5])
redis.call('ZADD', KEYS[3], position, ARGV[3])
redis.call('HDEL', KEYS[4], ARGV[2])
redis.call('HSET', KEYS[1], 'asks', text(redis.call('HLEN', KEYS[4])))
publish_inbox(ARGV[1], position, ARGV[3], 'answer', ARGV[4], ts, ARGV[5])
return {'OK', last + 1, head[1], head[2]}
