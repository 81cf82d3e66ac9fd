#!lua
-- PIECES: add to the answer that is being written, as its owner (core.intents.pieces).
-- KEYS 1 meta  2 tail
-- ARGV 1 channel  2 owner  3 epoch  4 position of the turn's message  5… pieces (JSON)
-- ->   'OK' | 'FENCED' | 'STALE'
-- @include now
-- @include publish
local head = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'done')
if head[1] ~= ARGV[2] or head[2] ~= ARGV[3] then return 'FENCED' end
if tonumber(ARGV[4]) <= tonumber(head[3]) then return 'STALE' end
if #ARGV < 5 then return 'OK' end
for i = 5, #ARGV do redis.call('XADD', KEYS[2], '*', 'p', ARGV[i]) end
publish_pieces(ARGV[1], ARGV[3], ARGV, 5)
return 'OK'
