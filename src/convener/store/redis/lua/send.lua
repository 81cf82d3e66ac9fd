#!lua
-- SEND: put a message into the inbox, once per id within the window of `seen` (core.conversation.send).
-- KEYS 1 meta  2 in  3 seen
-- ARGV 1 channel  2 message id  3 user  4 data (JSON)  5 max pending  6 '1' to refuse while busy  7 kind
-- ->   {'OK'|'DUP', position, owner, epoch} | {'NOT_FOUND'|'CLOSED'|'FAILED'|'HELD'|'FULL'|'BUSY'}
-- @include now
-- @include publish
-- @include refusal
-- @include inbox
local head = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'position', 'done', 'status')
if not head[5] then return {'NOT_FOUND'} end
if head[5] ~= 'running' then return {refusal(head[5])} end
local seen = redis.call('ZSCORE', KEYS[3], ARGV[2])
if seen then return {'DUP', tonumber(seen), head[1], head[2]} end
local last, done = tonumber(head[3]), tonumber(head[4])
if last - done >= tonumber(ARGV[5]) then return {'FULL'} end
if ARGV[6] == '1' and last > done then return {'BUSY'} end
local position, ts = text(last + 1), text(now)
put_inbox(position, ARGV[2], ARGV[7], ARGV[3], ts, ARGV[4])
redis.call('ZADD', KEYS[3], position, ARGV[2])
publish_inbox(ARGV[1], position, ARGV[2], ARGV[7], ARGV[3], ts, ARGV[4])
return {'OK', last + 1, head[1], head[2]}
