#!lua flags=no-writes
-- READ: a page of the log after a place, with generation and tip.
-- KEYS 1 meta  2 log
-- ARGV 1 generation ('' for a bare number)  2 epoch  3 seq  4 limit
-- ->   {generation, tip epoch, tip seq, 1 if resync else 0, entries, first seq here, archived, manifest} | nil
-- @include now
-- @include tip
local head = redis.call('HMGET', KEYS[1], 'generation', 'archived', 'manifest')
local generation, archived = head[1], tonumber(head[2] or 0)
if not generation then return false end
local tip_epoch, tip_seq = tip()
local seq = tonumber(ARGV[3])

local function parsed(entry)
  local epoch, number = string.match(entry[1], '^(%d+)-(%d+)$')
  return tonumber(epoch), tonumber(number)
end
local held = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
local first = tip_seq + 1
if held then first = select(2, parsed(held)) end
local function page(resync, entries)
  return {generation, tip_epoch, tip_seq, resync, entries, first, archived, head[3] or ''}
end

-- Id of the first entry with a seq above `seq`. Seqs are dense, but the epoch of each is not known: bisect for the
-- last epoch whose first entry is not beyond it. Both bounds are epochs that occur, so each look halves the rest.
local function located()
  local wanted = seq + 1
  local low, high = parsed(redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]), tip_epoch
  while low < high do
    local middle = math.floor((low + high + 1) / 2)
    local epoch, number = parsed(redis.call('XRANGE', KEYS[2], text(middle), '+', 'COUNT', 1)[1])
    if number <= wanted then
      low = epoch
    else
      high = parsed(redis.call('XREVRANGE', KEYS[2], text(middle) .. '-0', '-', 'COUNT', 1)[1])
    end
  end
  return text(low) .. '-' .. text(wanted)
end

local resync, from = 0, '-'
if ARGV[1] ~= '' then
  local id = ARGV[2] .. '-' .. ARGV[3]
  if ARGV[1] ~= generation then
    resync = 1
  elseif id ~= '0-0' then
    if #redis.call('XRANGE', KEYS[2], id, id) == 1 then from = '(' .. id else resync = 1 end
  end
elseif seq >= tip_seq then
  return page(0, {})
elseif seq >= first then
  from = located()
end
return page(resync, redis.call('XRANGE', KEYS[2], from, '+', 'COUNT', ARGV[4]) or {})
