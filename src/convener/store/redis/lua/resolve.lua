#!lua flags=allow-oom
-- RESOLVE: settle a claim with unknown outcome for good (core.conversation.resolve).
-- KEYS 1 meta  2 in
-- ARGV 1 me  2 nonce  3 epoch that the claim expected
-- ->   {'OWNED', head, inbox} | {'CANCELLED'|'MOVED', head} | {'NOT_FOUND'}
-- @include now
-- @include head
local head = read_head()
if not head then return {'NOT_FOUND'} end
if head.owner == ARGV[1] and head.nonce == ARGV[2] then
  return {'OWNED', listed(head), redis.call('XRANGE', KEYS[2], '-', '+')}
end
if head.epoch ~= ARGV[3] then return {'MOVED', listed(head)} end
head.epoch = text(tonumber(head.epoch) + 1)
redis.call('HSET', KEYS[1], 'epoch', head.epoch)
return {'CANCELLED', listed(head)}
